"""One stage for chains of transforms that crash or freeze, and what the topics must say, at any time and in the end."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from confluent_kafka import Consumer, IsolationLevel, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, ConsumerGroupDescription, NewTopic, OffsetSpec
from pydantic import BaseModel

from eoframework.settings import Settings
from tests.apps.chain import Item, Part, crumbs_of, parts_of
from tests.conftest import Addresses, database_named, make_settings
from tests.console_reader import console_read
from tests.consume.nursery import Forked, Nursery
from tests.processes import eventually, patiently, produce, read_topic, settings_environment

KEYS = 5
STAGES = ("fan", "pair")

Stage = Literal["fan", "pair"]
Line = tuple[str, str]
"""A record as the checks see it: key, value."""

# Small, so that there are many Kafka transactions; short, so that a test is.
QUICK = {"EO_TRANSFORM_BATCH": "10", "EO_TRANSFORM_INTERVAL": "0.05", "EO_MAX_WAIT": "0.1", "EO_LOG_LEVEL": "debug"}


_SETTLING = 3.0
_PATIENCE = 15.0
_TRANSACTION_TIMEOUT = 20.0
"""Longer than a transform's, and than Kafka takes to see that it is over."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A record in a topic."""

    partition: int
    offset: int
    key: str
    value: str


class Scene:
    """The chain app's processes on a database and topics of their own."""

    def __init__(
        self, settings: Settings, nursery: Nursery, directory: Path, *, partitions: int = 2, into: int | None = None
    ) -> None:
        """A and, unless `into` says otherwise, B and C have so many `partitions`."""
        self.settings = settings
        self.servers = settings.require_bootstrap_servers()
        self._nursery = nursery
        self._directory = directory
        self._spawned = 0
        unique = uuid.uuid4().hex[:10]
        self.a, self.b, self.c = (f"chain.{letter}.{unique}" for letter in "abc")
        self.groups: dict[Stage, str] = {"fan": f"chain-{self.a}.fan", "pair": f"chain-{self.a}.pair"}
        self.partitions = {self.a: partitions, self.b: into or partitions, self.c: into or partitions}
        self.items: list[Item] = []
        create_topics(self.servers, self.partitions | {f"{group}.dlt": 1 for group in self.groups.values()})

    # --- what happens ---

    def send(self, count: int) -> None:
        """Items of KEYS keys; each key's numbers count up."""
        made = [Item(key=f"k{n % KEYS}", n=n) for n in range(self.sent, self.sent + count)]
        self.items += made
        produce(self.servers, self.a, [(item.key.encode(), _json(item).encode()) for item in made])

    def spawn(self, *arguments: str, **environment: str) -> Forked:
        """An `eo run` of the chain."""
        self._spawned += 1
        return self._nursery.spawn(
            "run",
            "tests.apps.chain:app",
            *arguments,
            environment=settings_environment(
                self.settings, CHAIN_A=self.a, CHAIN_B=self.b, CHAIN_C=self.c, **{**QUICK, **environment}
            ),
            log=self._directory / f"{self.a}.{self._spawned}.log",
        )

    # --- what is to be seen ---

    def read(self, topic: str, *, isolation: str = "read_committed") -> list[Seen]:
        """All of the topic, by a client that knows nothing of ours."""
        return [
            Seen(m.partition() or 0, m.offset() or 0, (m.key() or b"").decode(), (m.value() or b"").decode())
            for m in read_topic(self.servers, topic, isolation=isolation)
        ]

    def committed(self, stage: Stage) -> dict[int, int]:
        """The group's offsets by partition, without those of transactions that are still open."""
        topic = self.a if stage == "fan" else self.b
        asked = [TopicPartition(topic, partition) for partition in range(self.partitions[topic])]
        consumer = offsets_reader(self.servers, self.groups[stage])
        try:
            return committed(consumer, asked)
        finally:
            consumer.close()

    def members(self, stage: Stage) -> list[str]:
        """The client ids of the group's members."""
        return [str(member.client_id) for member in self._described(stage).members]

    def shares(self, stage: Stage) -> list[int]:
        """How many partitions each of the group's members has."""
        return [len(member.assignment.topic_partitions) for member in self._described(stage).members]

    def _described(self, stage: Stage) -> ConsumerGroupDescription:
        group = self.groups[stage]
        return admin_client(self.servers).describe_consumer_groups([group], request_timeout=10)[group].result()

    def ends(self, topic: str, *, stable: bool) -> dict[int, int]:
        """Where each partition ends for read_committed readers (`stable`), or for others."""
        level = IsolationLevel.READ_COMMITTED if stable else IsolationLevel.READ_UNCOMMITTED
        asked = {TopicPartition(topic, partition): OffsetSpec.latest() for partition in range(self.partitions[topic])}

        def ask() -> dict[int, int]:
            answers = admin_client(self.servers).list_offsets(asked, isolation_level=level, request_timeout=10)
            return {where.partition: answer.result().offset for where, answer in answers.items()}

        return _answered(ask)

    def no_transaction_open(self, topic: str) -> None:
        """Wait for it: a commit is confirmed a moment before each partition has its marker."""

        def settled() -> bool:
            return self.ends(topic, stable=True) == self.ends(topic, stable=False)

        eventually(settled, f"no open transaction in {topic}", seconds=_TRANSACTION_TIMEOUT)

    def reach_the_end(self, *, seconds: float = 90, log: Path | None = None) -> None:
        """Wait until all that was sent has come out of the chain."""
        eventually(self.fan_done, f"fan at the end of {self.a}", seconds=seconds, log=log)
        self.no_transaction_open(self.b)
        ends = self.ends_of_records(self.read(self.b))
        eventually(lambda: self.committed("pair") == ends, f"pair at the end of {self.b}", seconds=seconds, log=log)

    def ends_of_records(self, records: Iterable[Seen]) -> dict[int, int]:
        """The offset after each partition's last record: behind it there may be markers of transactions."""
        ends = dict.fromkeys(range(self.partitions[self.b]), 0)
        return ends | {one.partition: one.offset + 1 for one in records}

    @property
    def sent(self) -> int:
        """How many items there are."""
        return len(self.items)

    def fan_done(self) -> bool:
        return sum(self.committed("fan").values()) >= self.sent

    def expected_parts(self) -> list[Line]:
        return [(part.key, _json(part)) for part in self._parts()]

    def expected_crumbs(self) -> list[Line]:
        return [(part.key, _json(crumb)) for part in self._parts() for crumb in crumbs_of(part)]

    def _parts(self) -> list[Part]:
        return [part for item in self.items for part in parts_of(item)]

    # --- what must be so ---

    def check_now(self) -> None:
        """While nobody runs: what is visible is made of exactly those inputs that the group's offsets have passed.

        So all outputs of an input are there, or none, in whatever partitions they are.
        """
        # A commit that was under way at a kill is visible in one partition a moment before the other.
        patiently(self._check_now, trouble=AssertionError, seconds=_SETTLING)

    def _check_now(self) -> None:
        fan, pair = self.committed("fan"), self.committed("pair")
        inputs = [Item.model_validate_json(one.value) for one in self.read(self.a) if one.offset < fan[one.partition]]
        parts = self.read(self.b)
        _same_per_key(parts, ((part.key, _json(part)) for item in inputs for part in parts_of(item)), "parts")
        passed = [Part.model_validate_json(one.value) for one in parts if one.offset < pair[one.partition]]
        crumbs = ((part.key, _json(crumb)) for part in passed for crumb in crumbs_of(part))
        _same_per_key(self.read(self.c), crumbs, "crumbs")

    def check_end(self, *, console: bool = False) -> None:
        """Everything once and in its key's order, offsets at the logs' ends, no transaction left open.

        console: let the broker's own consumer read the last topic, too.
        """
        for topic in (self.b, self.c):
            self.no_transaction_open(topic)
        parts, crumbs = self.read(self.b), self.read(self.c)
        _same_per_key(parts, self.expected_parts(), "parts")
        _same_per_key(crumbs, self.expected_crumbs(), "crumbs")
        assert self.committed("fan") == self.ends(self.a, stable=False)
        assert self.committed("pair") == self.ends_of_records(parts)
        if console:
            shown = console_read(self.servers, self.c, at_least=len(crumbs))
            assert [(one.partition, one.offset, one.key, one.value) for one in shown] == [
                (one.partition, one.offset, one.key, one.value) for one in crumbs
            ]

    def aborted(self, topic: str) -> int:
        """How many records there are that read_committed readers do not see."""
        return len(self.read(topic, isolation="read_uncommitted")) - len(self.read(topic))


class Stages:
    """Makes scenes on one database: their groups, which the tables know, are their own."""

    def __init__(self, settings: Settings, nursery: Nursery, directory: Path) -> None:
        self._make = partial(Scene, settings, nursery, directory)

    def scene(self, *, partitions: int = 2, into: int | None = None) -> Scene:
        return self._make(partitions=partitions, into=into)


@contextmanager
def open_stages(services: Addresses, template: str, directory: Path) -> Iterator[Stages]:
    """Scenes whose database and processes are gone at the end."""
    source = template.rsplit("/", 1)[1]
    with database_named(services, f"eo_chain_{uuid.uuid4().hex[:12]}", source=source) as url, Nursery() as nursery:
        yield Stages(make_settings(url, services.bootstrap_servers), nursery, directory)


def offsets_reader(servers: str, group: str) -> Consumer:
    """A client that asks for the group's offsets, and is no member of it."""
    return Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": group,
            # Read uncommitted: the broker answers at once, and with what was committed last.
            "isolation.level": "read_uncommitted",
            "enable.auto.commit": False,
        }
    )


def committed(reader: Consumer, asked: list[TopicPartition]) -> dict[int, int]:
    """The group's offsets by partition, 0 where there is none."""
    return _answered(lambda: {at.partition: max(at.offset, 0) for at in reader.committed(asked, timeout=10)})


def _answered(ask: Callable[[], dict[int, int]]) -> dict[int, int]:
    # A broker that has just started, or was too busy to say that it lives, leads nothing for a moment.
    return patiently(ask, trouble=KafkaException, seconds=_PATIENCE)


@cache
def admin_client(servers: str) -> AdminClient:
    return AdminClient({"bootstrap.servers": servers})


def create_topics(servers: str, partitions: Mapping[str, int]) -> None:
    """All at once: one by one they would take longer than most tests. With the brokers' default of replicas."""
    client = admin_client(servers)
    wanted = [NewTopic(topic, number) for topic, number in partitions.items()]
    for made in client.create_topics(wanted, request_timeout=20).values():
        made.result()

    def known() -> bool:
        there = client.list_topics(timeout=10).topics
        return all(
            topic in there and [p.leader >= 0 for p in there[topic].partitions.values()] == [True] * number
            for topic, number in partitions.items()
        )

    # The controller confirms a topic before every broker knows it.
    eventually(known, "the topics to have leaders", seconds=30)


def _json(model: BaseModel) -> str:
    return model.model_dump_json()


def _by_key(lines: Iterable[Line]) -> Mapping[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    for key, value in lines:
        found.setdefault(key, []).append(value)
    return found


def _same_per_key(found: Iterable[Seen], expected: Iterable[Line], what: str) -> None:
    there, wanted = _by_key((one.key, one.value) for one in found), _by_key(expected)
    for key in sorted(there.keys() | wanted.keys()):
        assert there.get(key, []) == wanted.get(key, []), f"{what} of key {key}: lost, repeated or out of order"
