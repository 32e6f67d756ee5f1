"""An app whose handler books each message into a ledger and publishes it on; crash points armed by the environment."""

from __future__ import annotations

import os

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Message, Topic, Tx
from tests.apps.large_result import receive_large_result
from tests.crash import arm_from_environment

LEDGER = """
CREATE TABLE IF NOT EXISTS ledger (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, partition int, "offset" bigint, key text, n int, pid int)
"""


class Entry(BaseModel):
    key: str
    n: int


entries = Topic(os.environ.get("LEDGER_TOPIC", "ledger.entries"), Entry, key="key")
booked = Topic(os.environ.get("BOOKED_TOPIC", "ledger.booked"), Entry, key="key")
# Groups are the broker's, which tests share: members of another test would make this one's wait for them.
app = App(f"ledger-{entries.name}")


@app.handler(entries, name="book")
def book(message: Message[Entry], tx: Tx) -> None:
    entry = message.payload
    tx.session.execute(
        text('INSERT INTO ledger (partition, "offset", key, n, pid) VALUES (:p, :o, :k, :n, pg_backend_pid())'),
        {"p": message.partition, "o": message.offset, "k": entry.key, "n": entry.n},
    )
    if os.environ.get("LARGE_RESULT_AT") == str(entry.n):
        receive_large_result(tx.session)
    if "BOOKED_TOPIC" in os.environ:
        tx.publish(booked, entry)


arm_from_environment()
