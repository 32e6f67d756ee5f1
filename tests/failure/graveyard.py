"""Dead letters and parked lanes as the worker's own stores write them, without a broker."""

from __future__ import annotations

import json
import uuid
from typing import Any

from sqlalchemy import text

from eoframework.db.dead_letters import Dead, DeadLetters
from eoframework.db.parking import Parking, Waiting
from eoframework.db.position import Positions, Stream
from eoframework.db.processed import ProcessedMessages
from eoframework.db.session import Database
from eoframework.failures import Cause, Parked
from eoframework.keys import lane_of_key
from eoframework.message import Record, position_id

TOPIC_ID = uuid.UUID(int=77)
TABLES = ("dead_letter", "parked_key", "parked_message", "processed_message", "position", "audit", "outbox_message")


class Graveyard:
    """One consumer and its letters."""

    def __init__(
        self, database: Database, consumer: str = "deadshop.book", *, topic: str = "dead.orders", started: bool = True
    ) -> None:
        self.database = database
        positions = Positions(database.schema)
        with database.begin("test") as connection:
            number = positions.register(connection, name=consumer, topic=topic)
            self.stream = Stream(number, consumer, topic, TOPIC_ID, "cluster")
            if started:
                positions.start(connection, self.stream, dict.fromkeys(range(3), 0))

    def record(
        self, offset: int, *, key: bytes | None = b"a", do: str = "", partition: int = 0, **changes: Any
    ) -> Record:
        value = json.dumps({"order_id": offset, "do": do}).encode()
        given: dict[str, Any] = {
            "value": value,
            "headers": (("trace", b"1"),),
            "timestamp": 1_700_000_000_000,
        } | changes
        return Record(self.stream.topic, partition, offset, key, **given | changes)

    def bury(
        self,
        offset: int,
        *,
        identity: bool | uuid.UUID = True,
        holds: bool = False,
        error_class: str = "builtins.ValueError",
        fingerprint: str = "f00",
        **record: Any,
    ) -> int:
        """A dead letter as the worker writes it, with its processed message; returns its number."""
        dead = self.record(offset, **record)
        parked = Parked(self.lane(dead), dead, attempts=5, crashes=1)
        identifier = identity if isinstance(identity, uuid.UUID) else uuid.uuid4() if identity else None
        cause = Cause(error_class, fingerprint, "shop.py:book", "no such article", "Traceback: ...")
        with self.database.begin("test") as connection:
            if identifier is not None:
                ProcessedMessages(self.database.schema).claim(connection, self.stream.consumer_id, {identifier})
            letter = Dead(parked, identifier, "5 attempts failed", cause, holds)
            number = DeadLetters(self.database.schema).bury(connection, self.stream, letter)
            if holds:
                Parking(self.database.schema).hold(connection, self.stream, [parked])
        return number

    def park(self, offset: int, *, wait: float | None = None, **record: Any) -> None:
        """A message that waits in its lane, as the first (`wait`, seconds) or behind others."""
        waiting = self.record(offset, **record)
        cause = Cause("builtins.KeyError", "b0b", "shop.py:book") if wait is not None else None
        parked = Parked(self.lane(waiting), waiting, attempts=1 if wait is not None else 0)
        with self.database.begin("test") as connection:
            Parking(self.database.schema).park(connection, self.stream, [Waiting(parked, None, wait, cause)])

    def lane(self, record: Record) -> uuid.UUID:
        if record.key is None:
            return position_id(TOPIC_ID, record.partition, record.offset)
        return lane_of_key(record.key)

    def everything(self) -> dict[str, list[str]]:
        """The contents of all tables that a tool may change."""
        with self.database.engine.connect() as connection:
            return {table: sorted(connection.scalars(text(f"SELECT t::text FROM eo.{table} t"))) for table in TABLES}

    def rows(self, statement: str) -> list[tuple[Any, ...]]:
        with self.database.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(text(statement))]

    def parked(self) -> list[int]:
        return [
            row[0] for row in self.rows('SELECT "offset" FROM eo.parked_message ORDER BY partition, lane, "offset"')
        ]

    def execute(self, statement: str) -> None:
        with self.database.engine.begin() as connection:
            connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
