"""The snapshot of one run, read by a plain consumer and a plain connection: none of the framework's own ways."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any
from uuid import UUID

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]
from sqlalchemy import Connection, Engine, text

from eoframework import clock
from eoframework.cloudevents import incoming_id
from tests.campaign import ledger_rules as rules
from tests.campaign.ledger import SOURCES, Account, Effect, Letter, Moved, Place, Published, Read, Sample

_READ_WITHIN = 60.0
_MARKERS_WITHIN = 5.0
TOPICS = ("entries", "steps", "settled", "crumbs", "dead")
_LEFT = {
    "outbox rows": "SELECT count(*) FROM eo.outbox_message",
    "delayed rows": "SELECT count(*) FROM eo.delayed_message",
    "parked messages": "SELECT count(*) FROM eo.parked_message",
    "shut lanes": "SELECT count(*) FROM eo.parked_key",
    "counted attempts": "SELECT count(*) FROM eo.attempt",
    "dead outbox rows": "SELECT count(*) FROM eo.dead_letter WHERE origin = 'outbox'",
    "relay members": "SELECT count(*) FROM eo.relay_member WHERE lease_until > clock_timestamp()",
    "owned shards": "SELECT count(*) FROM eo.relay_shard WHERE owner IS NOT NULL",
    "owned partitions": "SELECT count(*) FROM eo.position WHERE owner IS NOT NULL",
    "connections": """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
        AND backend_type = 'client backend' AND application_name <> 'campaign'""",
    "locks": """SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
        WHERE d.datname = current_database() AND l.pid <> pg_backend_pid()""",
}
_NOTICED_WITHIN = 10.0
# With the offsets of a transaction that is open it would be waited for.
_UNSTABLE = {"isolation.level": "read_uncommitted"}
_CONFIG = {
    "enable.auto.commit": False,
    "auto.offset.reset": "error",
    "enable.partition.eof": True,
    "fetch.wait.max.ms": 10,
    "log_level": 0,
}
_OPEN = """
SELECT pid || ' ' || state || ': ' || left(query, 80) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL
    AND backend_type = 'client backend'
UNION ALL SELECT 'prepared ' || gid FROM pg_prepared_xacts WHERE database = current_database()
"""


def topic_names(world: str) -> dict[str, str]:
    """The run's topics, by what they are to the checker."""
    return {**{name: f"{world}.{name}" for name in TOPICS}, "dead": f"{world}.crumble.dlt"}


# --- Kafka ------------------------------------------------------------------------------------------------------------


def read_all(
    servers: str,
    world: str,
    *,
    isolation: str,
    since: Mapping[Place, int] | None = None,
    only: Collection[Place] | None = None,
    within: float = _READ_WITHIN,
) -> dict[str, tuple[Read, ...]]:
    """Every record of the run's topics, partition by partition, up to where each ends now.

    since: where to begin, by a topic's whole name and partition, else at 0. only: these partitions.
    """
    names = {name: short for short, name in topic_names(world).items()}
    consumer = Consumer(
        {**_CONFIG, "bootstrap.servers": servers, "group.id": f"reader-{world}", "isolation.level": isolation}
    )
    try:
        metadata = consumer.list_topics(timeout=20).topics
        there = {(name, partition) for name in names for partition in metadata[name].partitions}
        waiting = there if only is None else there & set(only)
        found: dict[tuple[str, int], list[Read]] = {place: [] for place in waiting}
        consumer.assign([TopicPartition(*place, (since or {}).get(place, 0)) for place in waiting])
        deadline = clock.monotonic() + within
        while waiting:
            if clock.monotonic() > deadline:
                raise AssertionError(f"not read to the end: {waiting}")
            for message in consumer.consume(2000, 0.05):
                place = message.topic() or "", message.partition() or 0
                if _ends(message):
                    waiting.discard(place)
                else:
                    found[place].append(_read(message, names[place[0]]))
    finally:
        consumer.close()
    return {
        short: tuple(read for place in sorted(found) if place[0] == name for read in found[place])
        for name, short in names.items()
    }


class Groups:
    """Where groups stand, by a consumer for each that never joins it.

    Not by an AdminClient: asked while the coordinator moves, librdkafka 2.16 ends the whole process (SIGSEGV, seen;
    rd_kafka_handle_OffsetFetch takes it for granted that the client that asks is a member of a group).
    """

    def __init__(self, servers: str) -> None:
        self._servers = servers
        self._asking: dict[str, Consumer] = {}

    def offsets(self, group: str, topic: str, partitions: int) -> dict[int, int]:
        """0 for a partition without one; raises KafkaException."""
        if group not in self._asking:
            self._asking[group] = Consumer(
                {**_CONFIG, **_UNSTABLE, "bootstrap.servers": self._servers, "group.id": group}
            )
        asked = [TopicPartition(topic, partition) for partition in range(partitions)]
        found = self._asking[group].committed(asked, timeout=10)
        for failed in (each.error for each in found if each.error is not None):
            raise KafkaException(failed)
        return {each.partition: max(each.offset, 0) for each in found}

    def close(self) -> None:
        for consumer in self._asking.values():
            consumer.close()


class Tail:
    """Asks whether a partition has a record from an offset on, which its end does not tell: markers count there."""

    def __init__(self, servers: str) -> None:
        self._consumer = Consumer({**_CONFIG, "bootstrap.servers": servers, "group.id": "tail"})

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._consumer.close()

    def has_more(self, topic: str, partition: int, offset: int) -> bool:
        """True also when nobody can tell now."""
        self._consumer.assign([TopicPartition(topic, partition, offset)])
        message = self._consumer.poll(5)
        return message is None or not _ends(message)


def _ends(message: Message) -> bool:
    error = message.error()
    if error is None:
        return False
    if error.code() != KafkaError._PARTITION_EOF:
        raise AssertionError(f"reading {message.topic()}: {error}")
    return True


def _read(message: Message, topic: str) -> Read:
    value = json.loads(message.value() or b"{}")
    told: Any = message.headers() or []  # pairs, whatever else the stubs allow
    headers = tuple((name, _bytes(content)) for name, content in told)
    found = incoming_id(headers, topic=message.topic() or "")
    key = message.key()
    return Read(
        message.partition() or 0,
        message.offset() or 0,
        key.decode() if isinstance(key, bytes) else key,
        None if found is None else str(found),
        value.get("item", value.get("n")),
        value.get("crumb", 0),
    )


def _bytes(content: Any) -> bytes | None:
    return content.encode() if isinstance(content, str) else content


def held_up(admin: AdminClient, world: str, partitions: int) -> list[str]:
    """Partitions in which an open transaction keeps readers from the log's end; their last markers are waited for."""
    deadline = clock.monotonic() + _MARKERS_WITHIN
    names = [*topic_names(world).values()]
    while True:
        high = log_ends(admin, names, partitions)
        stable = log_ends(admin, names, partitions, isolation=IsolationLevel.READ_COMMITTED)
        found = [f"{name}[{partition}]" for (name, partition), end in high.items() if stable[name, partition] < end]
        if not found or clock.monotonic() > deadline:
            return found
        clock.sleep(0.05)


def log_ends(
    admin: AdminClient,
    names: list[str],
    partitions: int,
    *,
    isolation: IsolationLevel = IsolationLevel.READ_UNCOMMITTED,
) -> dict[Place, int]:
    """Where the partitions of these topics end, markers included."""
    # The transform's dead letters have as many partitions as anybody gives them.
    metadata = admin.list_topics(timeout=20).topics
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    wanted = {TopicPartition(name, p): latest for name in names for p in metadata[name].partitions}
    asked = admin.list_offsets(wanted, isolation_level=isolation, request_timeout=20)
    return {(where.topic, where.partition): future.result().offset for where, future in asked.items()}


def last_records(committed: Mapping[str, tuple[Read, ...]]) -> dict[Place, int]:
    """By topic and partition, the offset after its last record."""
    return {
        (topic, partition): max(read.offset for read in reads if read.partition == partition) + 1
        for topic, reads in committed.items()
        for partition in {read.partition for read in reads}
    }


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def short(name: str) -> str:
    """A consumer's name without its app's."""
    return name.rpartition(".")[2]


def positions(connection: Connection) -> dict[Place, int]:
    rows = connection.execute(
        text("SELECT c.name, p.partition, p.next_offset FROM eo.position p JOIN eo.consumer c ON c.id = p.consumer_id")
    )
    return {(short(name), partition): offset for name, partition, offset in rows}


def database_part(engine: Engine) -> dict[str, Any]:
    """The fields of the snapshot that stand in the database."""
    with engine.connect() as connection:
        return {
            "effects": _effects(connection),
            "accounts": _accounts(connection),
            "processed": _processed(connection),
            "published": _published(connection),
            "moves": _moves(connection),
            "letters": _letters(connection),
            "positions": positions(connection),
        }


def left(engine: Engine) -> dict[str, int]:
    """What is left over in the database, by name."""
    with engine.connect() as connection:
        return {name: int(connection.scalar(text(question)) or 0) for name, question in _LEFT.items()}


def held_by_the_dead(engine: Engine, living: Collection[int]) -> int:
    """Partitions whose owner was killed, and which nobody has claimed since: its group has not noticed yet."""
    with engine.connect() as connection:
        owners = connection.scalars(text("SELECT owner FROM eo.position WHERE owner IS NOT NULL"))
        return sum(int(owner.split(":")[1]) not in living for owner in owners)


def left_behind(engine: Engine) -> dict[str, int]:
    """As `left`, once the server has noticed that its clients are gone: they ended a moment ago."""
    deadline = clock.monotonic() + _NOTICED_WITHIN
    while (found := left(engine))["connections"] + found["locks"] and clock.monotonic() < deadline:
        clock.sleep(0.1)
    return found


def open_transactions(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return [row[0] for row in connection.execute(text(_OPEN))]


def _effects(connection: Connection) -> tuple[Effect, ...]:
    statement = """SELECT consumer, partition, "offset", id::text, key, item, amount, xid::text::bigint FROM effect
        ORDER BY seq"""
    return tuple(Effect(*row) for row in connection.execute(text(statement)))


def _accounts(connection: Connection) -> dict[tuple[str, str], Account]:
    rows = connection.execute(text("SELECT consumer, key, balance, items FROM account"))
    return {(consumer, key): Account(balance, tuple(items)) for consumer, key, balance, items in rows}


def _processed(connection: Connection) -> dict[str, frozenset[str]]:
    rows = connection.execute(
        text("SELECT c.name, message_id FROM eo.processed_message JOIN eo.consumer c ON c.id = consumer_id")
    )
    found: dict[str, set[str]] = {consumer: set() for consumer in rules.CONSUMERS}
    for name, message_id in rows:
        found[short(name)].add(str(UUID(str(message_id))))
    return {name: frozenset(ids) for name, ids in found.items()}


def _published(connection: Connection) -> tuple[Published, ...]:
    rows = connection.execute(text("SELECT id::text, topic, xid::text::bigint FROM outbox_seen ORDER BY seq"))
    return tuple(Published(name, short(topic), xid) for name, topic, xid in rows)


def _moves(connection: Connection) -> tuple[Moved, ...]:
    statement = "SELECT consumer, partition, epoch, next_offset, xid::text::bigint FROM position_seen ORDER BY seq"
    return tuple(Moved(short(consumer), *rest) for consumer, *rest in connection.execute(text(statement)))


def _letters(connection: Connection) -> tuple[Letter, ...]:
    statement = """SELECT c.name, partition, "offset" FROM eo.dead_letter JOIN eo.consumer c ON c.id = consumer_id
        WHERE origin = 'handler' """
    return tuple(
        Letter(short(name), partition, offset) for name, partition, offset in connection.execute(text(statement))
    )


def sampled(offsets: Mapping[Place, int], there: Mapping[Place, int]) -> list[Sample]:
    """Group offsets, and the positions that were read after them."""
    return [Sample(*place, offset, there.get(place, 0)) for place, offset in offsets.items() if place[0] in SOURCES]
