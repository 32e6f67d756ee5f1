"""One handler's executor on a real database, fed with records made here: for what does not depend on Kafka."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence

from eoframework import App
from eoframework.consume.assembly import assemble
from eoframework.consume.batch import Outcome
from eoframework.db.position import Positions, Stream
from eoframework.db.unit_of_work import Timeouts, WorkerConnection
from eoframework.message import Record
from tests.consume.harness import next_offsets, scalar

TOPIC_ID = uuid.UUID(int=7)


class Rig:
    """Claims partitions 0 to 2 and runs what it is given; the claims follow what was committed."""

    def __init__(self, app: App, *, budget: float = 60) -> None:
        self.app = app
        handler, database = app.handlers[0], app.database
        positions = Positions(database.schema)
        self.connection = WorkerConnection(database, Timeouts(10, 5, 4), handler=handler.group)
        with self.connection.begin("claims") as connection:
            number = positions.register(connection, name=handler.group, topic=handler.topic.name)
            stream = Stream(number, handler.group, handler.topic.name, TOPIC_ID, "cluster")
            positions.start(connection, stream, dict.fromkeys(range(3), 0))
            self.claims = {p: positions.claim(connection, stream, p, owner="rig") for p in range(3)}
        settings = app.settings.model_copy(update={"max_poll_interval": budget * 3})
        self._executor, self.drain = assemble(handler, app, stream, self.connection, settings)
        self._topic = handler.topic.name
        self._ends = dict.fromkeys(self.claims, 0)

    def record(
        self, value: bytes | None, *, partition: int = 0, identity: str | None = None, key: bytes | None = None
    ) -> Record:
        """The next record of the partition."""
        offset, self._ends[partition] = self._ends[partition], self._ends[partition] + 1
        headers = (("message-id", identity.encode()),) if identity else ()
        return Record(self._topic, partition, offset, key, value, headers, 0)

    def limit_time(self, seconds: float) -> None:
        """What the next batches may take."""
        self._executor._budget = seconds

    def run(self, records: Sequence[Record], careful: Collection[int] = ()) -> Outcome:
        claims = {r.partition: self.claims[r.partition] for r in records}
        outcome = self._executor.execute(records, claims, careful)
        for partition, offset in outcome.moved.items():
            self.claims[partition] = self.claims[partition].moved(offset)
        return outcome

    def run_parked(self, seconds: float = 10, careful: Collection[int] = ()) -> Outcome:
        """Run what is parked and due."""
        self.drain.look_soon()
        return self.drain.run(self.claims, careful, seconds=seconds)

    def positions(self) -> list[int]:
        return [offset for _, offset in next_offsets(self.app.database)]

    def booked(self) -> int:
        return int(scalar(self.app.database.engine, "SELECT count(*) FROM ledger"))
