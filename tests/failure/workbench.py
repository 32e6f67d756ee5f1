"""A handler that fails where it is told to, on the rig: a real database, no Kafka."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar
from uuid import UUID, uuid5

from pydantic import BaseModel, field_validator
from sqlalchemy import text

from eoframework import App, Message, Retry, Topic, Tx
from eoframework.consume.batch import Outcome
from eoframework.message import Record
from eoframework.retry import Backoff, fixed
from tests.consume.harness import column, make_ledger
from tests.consume.rig import Rig

NEVER = 3600.0
"""A pause that no test waits for."""

_NAMES = UUID(int=11)
_BOOK = text('INSERT INTO ledger (partition, "offset", note) VALUES (:p, :o, :n)')


class Entry(BaseModel):
    n: int
    on_negative: ClassVar[BaseException] = SystemExit(1)

    @field_validator("n")
    @classmethod
    def _positive(cls, n: int) -> int:
        if n < 0:
            raise cls.on_negative
        return n


class Echo(BaseModel):
    n: int


entries: Topic[Entry] = Topic("bench", Entry)
echoes: Topic[Echo] = Topic("echoes", Echo)

Trouble = Exception | Callable[[Message[Entry], Tx], object]


class Bench:
    """Books each entry, publishes it on, and then fails for the numbers in `broken`."""

    def __init__(self, app: App, *, retry: Retry | None = None, echo: bool = True, **options: Any) -> None:
        self.broken: dict[int, Trouble] = {}
        self.called: list[tuple[int, int]] = []
        """(number, attempt) of every call."""
        self._echo = echo
        make_ledger(app.database.engine)

        @app.handler(entries, name="book", retry=retry or retrying(), **options)
        def book(message: Message[Entry], tx: Tx) -> None:
            self._handle(message, tx)

        self.app = app
        self.rig = Rig(app)

    def _handle(self, message: Message[Entry], tx: Tx) -> None:
        n = message.payload.n
        self.called.append((n, message.attempt))
        tx.session.execute(_BOOK, {"p": message.partition, "o": message.offset, "n": str(n)})
        if self._echo:
            tx.publish(echoes, Echo(n=n), key=str(n))
        trouble = self.broken.get(n)
        if isinstance(trouble, Exception):
            raise trouble
        if trouble is not None:
            trouble(message, tx)

    # --- input ---

    def entry(self, n: int, key: str | None = "k", *, partition: int = 0, with_id: bool = True) -> Record:
        """The partition's next record; the number names it."""
        identity = str(id_of(n)) if with_id else None
        raw = key.encode() if key is not None else None
        return self.rig.record(b'{"n": %d}' % n, partition=partition, identity=identity, key=raw)

    def run(self, *records: Record) -> Outcome:
        return self.rig.run(records)

    def drain(self) -> Outcome:
        return self.rig.run_parked()

    # --- what the database says ---

    def booked(self) -> list[int]:
        return [int(note) for note in self.column("SELECT note FROM ledger ORDER BY id")]

    def parked(self) -> list[tuple[int, int, int]]:
        """(number, attempts, crashes), by lane and offset."""
        rows = self.rows(
            """SELECT (convert_from(value, 'UTF8')::json ->> 'n')::int, attempts, crashes FROM eo.parked_message
            ORDER BY partition, lane, "offset" """
        )
        return [(row[0], row[1], row[2]) for row in rows]

    def waiting(self) -> list[int]:
        return sorted(n for n, _, _ in self.parked())

    def lanes(self) -> int:
        return len(self.column("SELECT lane FROM eo.parked_key"))

    def dead(self) -> list[int]:
        """The numbers of the dead letters, as they died."""
        return self.column("SELECT (convert_from(payload, 'UTF8')::json ->> 'n')::int FROM eo.dead_letter ORDER BY id")

    def processed(self) -> set[UUID]:
        return set(self.column("SELECT message_id FROM eo.processed_message"))

    def published(self) -> list[int]:
        """What was published on, by the handler."""
        return self.column(
            """SELECT (convert_from(payload, 'UTF8')::json ->> 'n')::int FROM eo.outbox_message
            WHERE topic = 'echoes' ORDER BY seq"""
        )

    def make_due(self) -> None:
        self.execute("UPDATE eo.parked_key SET due_at = clock_timestamp() - interval '1 second'")

    def column(self, statement: str) -> list[Any]:
        return column(self.app.database.engine, statement)

    def rows(self, statement: str) -> Sequence[Any]:
        with self.app.database.engine.connect() as connection:
            return connection.execute(text(statement)).all()

    def execute(self, statement: str) -> None:
        with self.app.database.engine.begin() as connection:
            connection.execute(text(statement))

    def nothing_waits(self) -> bool:
        return not self.parked() and not self.lanes()


def retrying(attempts: int = 3, *, pause: float = 0.0, **options: Any) -> Retry:
    """A policy whose pauses are as long as they say."""
    return Retry(attempts=attempts, backoff=fixed(pause), jitter=0, **options)


def growing(first: float) -> Backoff:
    """Pauses of which only the first one ends while a test runs."""
    return Backoff(first, 1e6, NEVER)


def id_of(n: int) -> UUID:
    """The id of the message with this number."""
    return uuid5(_NAMES, str(n))
