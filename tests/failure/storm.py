"""An app whose messages say what becomes of them; STORM_AT kills and STORM_FREEZE stops its process at a boundary.

A boundary is an event, or one after it in the same transaction: "settled", "settled.committing", "settled.committed",
and so with "dead", "due", "unparked"; "charged". ":2" is the second time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections import Counter
from typing import Literal

from pydantic import BaseModel, model_validator
from sqlalchemy import text

from eoframework import App, Message, Retry, Topic, Tx, events, fixed
from tests.crash import freeze

ATTEMPTS = 2
CRASHES = 2

Fate = Literal["ok", "slow", "flaky", "poison", "exit", "segfault", "exit when parked", "exit when decoded"]


class Entry(BaseModel):
    key: str
    n: int
    fate: Fate = "ok"

    @model_validator(mode="after")
    def _decoded(self) -> Entry:
        if self.fate == "exit when decoded":
            os._exit(1)
        return self


class Booked(BaseModel):
    key: str
    n: int


entries = Topic(os.environ.get("LEDGER_TOPIC", "storm.entries"), Entry, key="key")
booked = Topic(os.environ.get("BOOKED_TOPIC", "storm.booked"), Booked, key="key")
app = App(f"storm-{entries.name}")


@app.handler(entries, name="book", retry=Retry(ATTEMPTS, backoff=fixed(0.05), jitter=0, crashes=CRASHES), breaker=None)
def book(message: Message[Entry], tx: Tx) -> None:
    entry = message.payload
    tx.session.execute(
        text('INSERT INTO ledger (partition, "offset", key, n, pid) VALUES (:p, :o, :k, :n, pg_backend_pid())'),
        {"p": message.partition, "o": message.offset, "k": entry.key, "n": entry.n},
    )
    tx.publish(booked, Booked(key=entry.key, n=entry.n))
    _meet(entry.fate, message.attempt)


def _meet(fate: Fate, attempt: int) -> None:
    if fate == "slow":
        time.sleep(0.03)
    if fate == "poison" or (fate in ("flaky", "exit when parked") and attempt == 1):
        raise ValueError(fate)
    if fate in ("exit", "exit when parked"):
        os._exit(1)
    if fate == "segfault":
        ctypes.string_at(0)


class Boundaries:
    """Names the moments of a process, in the transactions of messages that fail or have failed."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self._flow = ""

    def __call__(self, name: str, fields: dict[str, object]) -> None:
        if name in ("consume.settled", "consume.due", "consume.charged"):
            self._flow = "dead" if fields.get("dead") else name.removeprefix("consume.")
            self._pass(self._flow)
        elif name in ("db.committing", "db.committed") and self._flow:
            self._pass(f"{self._flow}.{name.removeprefix('db.')}")
        if name in ("db.committed", "consume.charged"):
            self._flow = ""
        if name == "consume.unparked":
            self._pass("unparked")

    def _pass(self, moment: str) -> None:
        self._seen[moment] += 1
        here = f"{moment}:{self._seen[moment]}"
        if here == os.environ.get("STORM_AT"):
            os.kill(os.getpid(), signal.SIGKILL)
        if here == os.environ.get("STORM_FREEZE"):
            freeze()


events.subscribe(Boundaries())
