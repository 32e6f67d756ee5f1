"""A group of two workers on a real database, moved step by step: the real executor, drain and claims, and no Kafka.

One thread does everything, so a run is the same each time. What would come from elsewhere comes at two kinds of
moments: between two transactions of a worker (another worker, an operator), and at a durability boundary (a crash, a
COMMIT whose answer is lost).
"""

from __future__ import annotations

import itertools
import json
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Message, Topic, Tx, events
from eoframework.cloudevents import incoming_id
from eoframework.consume.assembly import assemble
from eoframework.consume.ownership import Ownership
from eoframework.consume.start import GroupOffsets
from eoframework.db.outbox import decode_headers
from eoframework.db.position import Positions, Stream
from eoframework.db.session import Connection, Database
from eoframework.db.unit_of_work import Timeouts, WorkerConnection
from eoframework.errors import BatchItemFailed, LostConnection, Reject, Retryable, RetryLater
from eoframework.message import Record
from eoframework.retry import AfterDead, Ordering, Retry, fixed
from eoframework.settings import Settings
from tests.processes import eventually

TOPIC_ID = uuid.UUID(int=4711)
PARTITIONS = (0, 1)
ATTEMPTS, CRASHES, CAREFUL_FOR = 3, 4, 3
EVER = 1_000_000

TABLE = """
CREATE TABLE effect (seq bigint GENERATED ALWAYS AS IDENTITY, consumer text, partition int, "offset" bigint, id uuid,
    attempt int, rightful boolean, xid bigint DEFAULT pg_current_xact_id()::text::bigint);
-- Not its xmin: that is the savepoint's.
ALTER TABLE eo.dead_letter ADD COLUMN xid bigint DEFAULT pg_current_xact_id()::text::bigint
"""
_EFFECT = text("""
INSERT INTO effect (consumer, partition, "offset", id, attempt, rightful)
SELECT p.c, p.p, p.o, p.i, p.a, EXISTS (SELECT FROM eo.position x JOIN eo.consumer y ON y.id = x.consumer_id
    WHERE y.name = p.c AND x.partition = p.p AND x.owner = :owner)
FROM (SELECT cast(:c AS text) c, cast(:p AS int) p, cast(:o AS bigint) o, cast(:i AS uuid) i, cast(:a AS int) a) p
""")

_EPOCHS = text("SELECT partition, epoch FROM eo.position WHERE consumer_id = :c")
_DUE = text("""
UPDATE eo.parked_key k SET due_at = now() FROM (SELECT ctid FROM eo.parked_key WHERE consumer_id = :c FOR UPDATE
    SKIP LOCKED) free WHERE k.ctid = free.ctid
""")
_WAITS = text("""
SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')
""")

Place = tuple[int, int]
Fails = Literal["never", "raises", "sql", "rejects", "later", "kills", "undecodable", "unreadable"]
Style = Literal["single", "fail", "item", "raise"]
"""A handler of single messages, or a batch handler and how it says that a message fails."""
Mishap = Literal["crash", "lost", "undone", "stopping"]

_numbers = itertools.count()


class Entry(BaseModel):
    p: int
    o: int


class Crash(BaseException):
    """The process is gone at this point."""


class Failing(Exception):
    """What a handler raises."""


@dataclass(frozen=True)
class Variant:
    """How the handler is declared."""

    ordering: Ordering = "key"
    after_dead: AfterDead = "continue"
    style: Style = "single"
    pause: float = 0.0
    """Seconds between attempts; time passes only when the test says so."""
    max_parked: int = 10_000
    dead_letter_topic: bool = False


@dataclass(frozen=True)
class Script:
    """What becomes of one delivery: it fails at its first `times` attempts."""

    fails: Fails = "never"
    times: int = 0


@dataclass
class Fault:
    """One mishap: at the `at`-th boundary that suits it, counted down."""

    kind: Mishap
    at: int


@dataclass
class Seen:
    """What the database shows; every tuple begins with partition and offset."""

    effects: list[tuple[int, int, int, int, bool, int]]
    """..., seq, attempt, rightful, transaction."""
    parked: list[tuple[int, int, uuid.UUID, int, int]]
    """..., lane, attempts, crashes."""
    dead: list[tuple[int, int, int, int, str, bool, int, int]]
    """..., number, attempts, error class, holds, transaction, crashes."""
    keys: list[tuple[int, uuid.UUID, bool]]
    processed: set[uuid.UUID]
    positions: dict[int, tuple[int, int]]
    attempts: list[tuple[int, int, int, int]]
    outbox: Counter[tuple[str, int, int]] = field(default_factory=Counter)

    def of(self, partition: int) -> object:
        """Everything about one partition that its owner alone may change."""
        rows = (self.effects, self.parked, self.dead, self.keys, self.attempts)
        return [[row for row in table if row[0] == partition] for table in rows], self.positions[partition]


class Alongside:
    """Something done on another thread as far as it goes: to its end, or to a lock that somebody holds."""

    def __init__(self, database: Database, act: Callable[[], None]) -> None:
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=[act])
        self._thread.start()
        with database.engine.connect() as connection:
            eventually(lambda: not self._thread.is_alive() or connection.scalar(_WAITS), "it ends, or waits for a lock")

    def _run(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as failure:  # noqa: BLE001 - raised again by end()
            self._failure.append(failure)

    def end(self) -> None:
        """Wait for its end; raises what it raised."""
        self._thread.join()
        if self._failure:
            raise self._failure[0]


class Kafka:
    """What a claim asks of Kafka: the topic is the one it was, nobody moved the group's offsets."""

    def __init__(self, logs: dict[int, list[Record]]) -> None:
        self._logs = logs

    def ask_topic_id(self, topic: str) -> Callable[[], uuid.UUID]:
        return lambda: TOPIC_ID

    def group_offsets(self, group: str, topic: str) -> GroupOffsets:
        return {}

    def watermarks(self, topic: str, partition: int) -> tuple[int, int]:
        return 0, len(self._logs[partition])


class Interrupted(WorkerConnection):
    """A worker's connection; something may happen each time before a transaction is begun."""

    before: Callable[[], None] = staticmethod(lambda: None)

    @contextmanager
    def begin(self, what: str, *, opening: bool = True) -> Iterator[Connection]:
        self.before()
        with super().begin(what, opening=opening) as connection:
            yield connection


class Worker:
    """One process of the group, as consume/worker.py would move it; dead after a crash."""

    def __init__(self, world: World) -> None:
        self.name = f"worker{next(_numbers)}"
        self.world = world
        self.checks = EVER
        handler, schema = world.app.handlers[0], world.app.database.schema
        self.connection = Interrupted(world.app.database, Timeouts(10, 5, 8), handler=handler.group)
        self.ownership = Ownership(
            world.stream,
            Positions(schema),
            self.connection,
            Kafka(world.logs),
            owner=self.name,
            mark=lambda claim: None,
            careful_for=CAREFUL_FOR,
        )
        self._executor, self._drain = assemble(
            handler, world.app, world.stream, self.connection, world.settings, stopping=self._stopping
        )

    def _stopping(self) -> bool:
        self.checks -= 1
        return self.checks < 0

    def claim(self, mine: set[int]) -> None:
        """Claim what the group says is ours; what is not ours any more and known to be lost is let go."""
        for partition in self.ownership.due():
            if partition not in mine:
                self.ownership.revoked([partition])
                continue
            try:
                self.ownership.claim_waiting(partition)
            except Retryable:
                return
        missing = mine - self.ownership.claims.keys()
        if missing:
            self.ownership.assigned(missing)

    def fetch_and_execute(self, size: int) -> None:
        """One batch, over all partitions that it believes it owns."""
        records: list[Record] = []
        for partition, claim in sorted(self.ownership.claims.items()):
            records += self.world.logs[partition][claim.next_offset : claim.next_offset + size]
        if not records:
            return
        touched = {record.partition for record in records}
        claims = {partition: self.ownership.claims[partition] for partition in touched}
        outcome = self._executor.execute(records, claims, self.ownership.careful() & touched)
        for partition, offset in outcome.moved.items():
            if partition in self.ownership.claims:
                self.ownership.claims[partition] = self.ownership.claims[partition].moved(offset)
            self.ownership.survived(partition, sum(r.partition == partition and r.offset < offset for r in records))
        self._apply(outcome.fenced, outcome.trouble)

    def drain(self) -> None:
        """Run what is due, as far as it goes."""
        self._drain.look_soon()
        outcome = self._drain.run(self.ownership.claims, self.ownership.careful(), seconds=60)
        self._apply(outcome.fenced, outcome.trouble)

    def _apply(self, fenced: set[int], trouble: Retryable | None) -> None:
        self.ownership.fenced(fenced)
        for partition in fenced - self.world.owned_by(self):
            self.ownership.revoked([partition])
        if isinstance(trouble, LostConnection):
            self.ownership.in_doubt()

    def die(self) -> None:
        self.connection.discard()


class World:
    """One consumer of its own, its logs, its two workers, and what happens to them."""

    def __init__(self, database: Database, settings: Settings, variant: Variant) -> None:
        self.variant, self.settings, self.database = variant, settings, database
        self.logs: dict[int, list[Record]] = {partition: [] for partition in PARTITIONS}
        self.scripts: dict[Place, Script] = {}
        self.kills: Counter[Place] = Counter()
        self.crashes = 0
        self.app = App(f"world{next(_numbers)}", engine=database.engine, settings=settings)
        self.out = Topic(f"out.{self.app.name}", Entry)
        self._declare()
        group = self.app.handlers[0].group
        positions = Positions(database.schema)
        with database.begin("test") as connection:
            number = positions.register(connection, name=group, topic="parking")
            self.stream = Stream(number, group, "parking", TOPIC_ID, "cluster")
            positions.start(connection, self.stream, dict.fromkeys(PARTITIONS, 0))
        self.assignment = {0: 0, 1: 1}
        self.workers = [Worker(self), Worker(self)]
        self._running: list[Worker] = []
        self._fault: Fault | None = None
        self._dying = False
        """The process has ended inside the handler: nothing is committed any more, and nothing begun."""
        self._unsubscribe = events.subscribe(self._boundary)

    def close(self) -> None:
        self._unsubscribe()
        for worker in self.workers:
            worker.die()

    # --- the handler ---

    def _declare(self) -> None:
        variant = self.variant
        options: dict[str, Any] = {
            "retry": Retry(ATTEMPTS, backoff=fixed(variant.pause), jitter=0, crashes=CRASHES),
            "ordering": variant.ordering,
            "after_dead": variant.after_dead,
            "max_parked": variant.max_parked,
            "dead_letter_topic": variant.dead_letter_topic,
            "breaker": None,
        }

        def book(message: Message[Entry], tx: Tx) -> None:
            # The effect first: whatever fails then has something to take back.
            self._effect(message, tx)
            self._act(message, tx)

        def book_all(messages: list[Message[Entry]], tx: Tx) -> None:
            for index, message in enumerate(messages):
                try:
                    self._act(message, tx)
                except Exception as error:
                    if variant.style == "raise" or self.scripts[message.partition, message.offset].fails == "sql":
                        raise
                    if variant.style == "item":
                        raise BatchItemFailed(index) from error
                    tx.fail(index, error)
                else:
                    self._effect(message, tx)

        topic = Topic("parking", Entry)
        if variant.style == "single":
            self.app.handler(topic, name="book", **options)(book)
        else:
            self.app.batch_handler(topic, name="book", **options)(book_all)

    def _effect(self, message: Message[Entry], tx: Tx) -> None:
        values = {"c": self.stream.consumer, "p": message.partition, "o": message.offset, "i": message.id}
        tx.session.execute(_EFFECT, {**values, "a": message.attempt, "owner": self._running[-1].name})
        tx.publish(self.out, Entry(p=message.partition, o=message.offset), cause=message)

    def _act(self, message: Message[Entry], tx: Tx) -> None:
        place = message.partition, message.offset
        script = self.scripts[place]
        if script.fails == "kills":
            if self.kills[place] < script.times:
                self.kills[place] += 1
                self._dying = True
                raise Failing
        elif message.attempt <= script.times:
            if script.fails == "sql":
                tx.session.execute(text("SELECT 1 / 0"))
            if script.fails == "later":
                raise RetryLater(after=self.variant.pause)
            raise Reject("it will never do") if script.fails == "rejects" else Failing

    # --- what comes in ---

    def append(self, partition: int, key: bytes | None, identity: str | None, script: Script) -> None:
        offset = len(self.logs[partition])
        value = b"\xff" if script.fails == "undecodable" else b'{"p": %d, "o": %d}' % (partition, offset)
        headers = (("message-id", identity.encode()),) if identity else ()
        unreadable = "a header" if script.fails == "unreadable" else ""
        self.logs[partition].append(Record("parking", partition, offset, key, value, headers, 0, unreadable))
        self.scripts[partition, offset] = script

    def heal(self, place: Place) -> None:
        if self.scripts[place].fails not in {"undecodable", "unreadable"}:
            self.scripts[place] = Script()

    def id_of(self, place: Place) -> uuid.UUID | None:
        return incoming_id(self.logs[place[0]][place[1]].headers, topic="parking")

    # --- the workers ---

    def epochs(self) -> dict[int, int]:
        """Under which claim each partition stands."""
        with self.database.engine.connect() as connection:
            rows = connection.execute(_EPOCHS, {"c": self.stream.consumer_id})
            return {row.partition: row.epoch for row in rows}

    def owned_by(self, worker: Worker) -> set[int]:
        return {partition for partition, index in self.assignment.items() if self.workers[index] is worker}

    def work(
        self,
        index: int,
        *,
        size: int = 0,
        drain: bool = False,
        fault: Fault | None = None,
        between: dict[int, Callable[[], None]] | None = None,
    ) -> None:
        """A worker claims what is its own, runs a batch of `size` a partition, and drains.

        between: what happens before its n-th transaction.
        """
        worker = self.workers[index]
        worker.checks = fault.at if fault is not None and fault.kind == "stopping" else EVER
        begun = itertools.count()
        happens = between or {}

        def interrupt() -> None:
            if self._dying:
                raise Crash
            with self._set_aside():
                happens.pop(next(begun), lambda: None)()

        worker.connection.before = interrupt
        self._running.append(worker)
        self._fault = replace(fault) if fault is not None else None
        try:
            worker.claim(self.owned_by(worker))
            worker.fetch_and_execute(size)
            if drain:
                worker.drain()
        except Crash:
            self.crashes += 1
            worker.die()
            self.workers[index] = Worker(self)
        finally:
            self._fault, self._dying = None, False
            self._running.pop()
            worker.connection.before = lambda: None

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        """What happens meanwhile has no part in the fault."""
        fault, self._fault = self._fault, None
        yield
        self._fault = fault

    def _boundary(self, name: str, fields: dict[str, object]) -> None:
        if self._dying and not name.startswith("replay."):
            raise Crash
        fault = self._fault
        names = {"lost": "db.committed", "undone": "db.committing", "crash": name}
        if fault is None or name != names.get(fault.kind):
            return
        fault.at -= 1
        if fault.at >= 0:
            return
        self._fault = None
        if fault.kind == "crash":
            raise Crash
        if fault.kind == "undone":
            raise LostConnection("the connection was lost before COMMIT")
        raise LostConnection("the connection was lost after COMMIT, before its answer")

    def move(self, partition: int, how: Literal["steal", "clean", "late"]) -> None:
        """The group gives the partition to the other worker. `steal`: its owner does not hear of it, a zombie."""
        owner = self.workers[self.assignment[partition]]
        self.assignment[partition] = 1 - self.assignment[partition]
        heir = self.workers[self.assignment[partition]]
        if how != "steal":
            owner.ownership.revoked([partition])
        if how == "clean":
            owner.ownership.release_left()
        heir.ownership.assigned([partition])
        if how == "late":
            owner.ownership.release_left()

    def restart(self, index: int) -> None:
        """A deploy: the worker releases its partitions, and another process takes its place."""
        self.workers[index].ownership.release()
        self.workers[index].die()
        self.workers[index] = Worker(self)

    def time_passes(self) -> None:
        """Every lane is due, but those that an operator is about to change."""
        with self.database.engine.begin() as connection:
            connection.execute(_DUE, {"c": self.stream.consumer_id})

    # --- looking ---

    def look(self) -> Seen:
        here = {"c": self.stream.consumer_id, "n": self.stream.consumer, "out": f"out.{self.app.name}"}
        with self.database.engine.connect() as connection:

            def rows(statement: str) -> list[Any]:
                return [tuple(row) for row in connection.execute(text(statement), here)]

            seen = Seen(
                effects=rows(
                    'SELECT partition, "offset", seq, attempt, rightful, xid FROM effect '
                    "WHERE consumer = :n ORDER BY seq"
                ),
                parked=rows(
                    'SELECT partition, "offset", lane, attempts, crashes FROM eo.parked_message WHERE consumer_id = :c'
                ),
                dead=rows(
                    'SELECT partition, "offset", id, attempts, error_class, holds, xid, crashes '
                    "FROM eo.dead_letter WHERE consumer_id = :c ORDER BY id"
                ),
                keys=rows("SELECT partition, lane, held FROM eo.parked_key WHERE consumer_id = :c"),
                processed={
                    row[0] for row in rows("SELECT message_id FROM eo.processed_message WHERE consumer_id = :c")
                },
                positions={
                    row[0]: (row[1], row[2])
                    for row in rows("SELECT partition, next_offset, epoch FROM eo.position WHERE consumer_id = :c")
                },
                attempts=rows('SELECT partition, "offset", attempts, crashes FROM eo.attempt WHERE consumer_id = :c'),
            )
            effects = rows("SELECT convert_from(payload, 'UTF8') FROM eo.outbox_message WHERE topic = :out")
            letters = rows("SELECT headers::text FROM eo.outbox_message WHERE topic = :n || '.dlt'")
        seen.outbox = Counter(self._published(row[0]) for row in effects)
        seen.outbox.update(self._letter(row[0]) for row in letters)
        return seen

    def _published(self, payload: str) -> tuple[str, int, int]:
        entry = Entry.model_validate_json(payload)
        return "effect", entry.p, entry.o

    def _letter(self, headers: str) -> tuple[str, int, int]:
        found = dict(decode_headers(json.loads(headers)))
        return "dead", int(found["eo-dlt-partition"] or b""), int(found["eo-dlt-offset"] or b"")
