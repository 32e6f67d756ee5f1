"""The tables, the topics and the handler of a cycle: what a user of the framework would have written."""

from __future__ import annotations

import os
import signal
from typing import Any

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, External, ExternalCall, Message, NotDone, Topic, Tx
from eoframework.db.session import Database
from eoframework.errors import BatchItemFailed, Reject, RetryLater
from eoframework.retry import Retry, fixed
from eoframework.settings import Settings
from tests.campaign.forked_board import Board
from tests.campaign.forked_broker import REFUSED
from tests.campaign.forked_case import ATTEMPTS, OUT, TOPIC, Case, Place

TABLES = """
CREATE TABLE effect (seq bigint GENERATED ALWAYS AS IDENTITY, consumer text, partition int, "offset" bigint, key bytea,
    amount bigint, attempt int, called bigint, rightful boolean, pid int DEFAULT pg_backend_pid());
CREATE INDEX effect_consumer ON effect (consumer);
CREATE TABLE written (consumer text, number int, PRIMARY KEY (consumer, number));
CREATE TABLE account (consumer text, key bytea, balance bigint, items bigint[], PRIMARY KEY (consumer, key));
"""
# A sum shows what is doubled or lost, a list its order; both are read before they are written, as users' tables are.
# rightful: whether the backend that writes is the one that the partition's row names, at this very moment.
_EFFECT = text("""
WITH effect AS (
    INSERT INTO effect (consumer, partition, "offset", key, amount, attempt, called, rightful)
    SELECT g.c, g.p, g.o, g.k, g.m, g.a, g.called, EXISTS (SELECT FROM eo.position x JOIN eo.consumer y
        ON y.id = x.consumer_id WHERE y.name = g.c AND x.partition = g.p AND x.backend_pid = pg_backend_pid())
    FROM (SELECT cast(:c AS text) c, cast(:p AS int) p, cast(:o AS bigint) o, cast(:k AS bytea) k,
        cast(:m AS bigint) m, cast(:a AS int) a, cast(:called AS bigint) called) g)
INSERT INTO account AS old VALUES (:c, :k, :m, ARRAY[cast(:item AS bigint)])
ON CONFLICT (consumer, key) DO UPDATE SET balance = old.balance + excluded.balance, items = old.items || excluded.items
""")
ITEM = 1_000
"""An item of an account's list is partition * ITEM + offset."""
NO_KEY = b"-"


class Entry(BaseModel):
    p: int
    o: int
    amount: int


class Booked(BaseModel):
    p: int
    o: int
    note: str = ""


# Made once: a process that is forked has them already.
_IN, OUTBOX = Topic(TOPIC, Entry), Topic(OUT, Booked)
_RAISE = ("raises", "sql", "later", "rejects")


def result_of(place: Place) -> int:
    """What the call for a message returns, and what a person finds out about one that ended without an answer."""
    return place[0] * ITEM + place[1]


class Failing(Exception):
    """What the handler raises."""


class Shop:
    """The application: one handler, which books amounts and publishes what it has booked."""

    def __init__(self, case: Case, name: str, board: Board, database: Database, settings: Settings) -> None:
        self.case, self.board = case, board
        self.app = App(name, engine=database.engine, settings=settings)
        self._healed = False
        self._declare()
        self.handler = self.app.handlers[0]

    @property
    def healed(self) -> bool:
        """Whether what used to fail does so no more: an operator has mended it."""
        self._healed = self._healed or self.board.count("healed") > 0
        return self._healed

    def _declare(self) -> None:
        flow = self.case.flow
        options: dict[str, Any] = {
            "retry": Retry(ATTEMPTS, backoff=fixed(flow.pause), jitter=0, crashes=self.case.crashes),
            "ordering": flow.ordering,
            "after_dead": flow.after_dead,
            "dead_letter_topic": flow.dead_letter_topic,
            "breaker": None,
        }
        if flow.batch:
            self.app.batch_handler(_IN, name="book", **options)(self._book_all())
            return
        if flow.external is not None:
            options["external"] = [External("charge", self._charge(), unresolved=flow.external)]

        def book(message: Message[Entry], tx: Tx) -> None:
            # The effect first: whatever fails then has something to take back.
            self._effect(message, tx)
            self._act(message, tx)

        self.app.handler(_IN, name="book", **options)(book)

    def _book_all(self) -> Any:
        def book_all(messages: list[Message[Entry]], tx: Tx) -> None:
            for index, message in enumerate(messages):
                fails = self.case.sent[message.partition, message.offset].fails
                try:
                    self._act(message, tx)
                except Exception as error:
                    if fails == "sql":
                        raise
                    if fails == "rejects":
                        raise BatchItemFailed(index) from error
                    tx.fail(index, error)
                else:
                    self._effect(message, tx)

        return book_all

    def _charge(self) -> Any:
        def charge(message: Message[Entry], call: ExternalCall) -> int:
            sent = self.case.sent[message.partition, message.offset]
            if sent.fails == "undone" and message.attempt <= sent.times:
                raise NotDone(after=0.0)
            about = f"call {sent.partition} {sent.offset} {call.key}"
            # As docs/effects.md advises whoever is called: a caller that was taken over is refused by its fence.
            if any(int(line.split()[-1]) > call.fence for line in self.board.lines() if line.startswith(about)):
                raise Failing
            self.board.note(f"{about} {call.fence}")
            if sent.fails == "breaks" and not self.healed:
                raise Failing
            return result_of(sent.place)

        return charge

    def _effect(self, message: Message[Entry], tx: Tx) -> None:
        place = message.partition, message.offset
        called = tx.external("charge") if self.case.flow.external else None
        values = {"c": self.handler.group, "p": place[0], "o": place[1], "k": message.key or NO_KEY}
        more = {"m": message.payload.amount, "a": message.attempt, "called": called}
        tx.session.execute(_EFFECT, {**values, **more, "item": place[0] * ITEM + place[1]})
        note = REFUSED.decode() if self.case.sent[place].fails == "refused" else ""
        delay = 0.001 if self.case.sent[place].fails == "late" else None
        tx.publish(OUTBOX, Booked(p=place[0], o=place[1], note=note), key=message.key, cause=message, delay=delay)

    def _act(self, message: Message[Entry], tx: Tx) -> None:
        sent = self.case.sent[message.partition, message.offset]
        if self.healed:
            return
        if sent.fails == "kills":
            self._die_of(f"deadly {sent.partition} {sent.offset}", sent.times)
        elif sent.fails in _RAISE and message.attempt <= sent.times:
            if sent.fails == "sql":
                tx.session.execute(text("SELECT 1 / 0"))
            if sent.fails == "later":
                raise RetryLater(after=self.case.flow.pause)
            raise Reject("it will never do") if sent.fails == "rejects" else Failing

    def _die_of(self, message: str, times: int) -> None:
        if self.board.count(message) < times:
            self.board.note(message)
            os.kill(os.getpid(), signal.SIGKILL)
