"""What runs on the three brokers while they fail: a chain of transforms, and the spine of worker and relay."""

from __future__ import annotations

import json
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import create_engine, text

from eoframework import dev
from eoframework.checkpoint import transactional_id
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.apps.chain import CRUMBS, Item, parts_of
from tests.apps.ledger import LEDGER
from tests.cluster.brokers import Brokers
from tests.cluster.load import Load, Watcher
from tests.conftest import make_settings
from tests.consume.harness import scalar
from tests.consume.nursery import Forked, Nursery
from tests.outages import conftest as outages
from tests.processes import eventually, read_topic
from tests.transform.scene import KEYS, Scene, admin_client

# Below the group's session timeout of the tests' brokers (3 s), as the ladder of a transform's timeouts wants it.
SHORT_TIMEOUTS = {"EO_TRANSFORM_TRANSACTION_TIMEOUT": "2.5", "EO_TRANSFORM_MESSAGE_TIMEOUT": "2"}
# Batches that grow with the backlog: three brokers on two processors may take their time for each commit.
_BATCHES = {"EO_TRANSFORM_BATCH": "1000", "EO_TRANSFORM_INTERVAL": "0.1", "EO_LOG_LEVEL": "info"}

Role = Callable[[], dev.KafkaBroker]


class Flow(ABC):
    """Processes under load. `roles` are the brokers' parts in it, asked for when they are needed."""

    name: str
    roles: Mapping[str, Role]
    load: Load
    watcher: Watcher
    processes: list[Forked]

    def start(self) -> None:
        """Wait for the first outputs."""
        self.watcher.start()
        self.load.start()
        self.goes_on()

    def goes_on(self, *, seconds: float = 90) -> None:
        """Wait until all that was sent up to now, and a bit more, has come out, of every partition."""
        mark = self.load.sent + int(self.load.rate / 2)
        what = f"{self.name}: item {mark} has come out"
        eventually(
            lambda: self.watcher.visible() > mark or self.watcher.failures,
            what,
            seconds=seconds,
            log=self.processes[0].log,
        )
        assert not self.watcher.failures, self.watcher.failures

    def finish(self) -> None:
        """Everything comes out, the same processes end in order, and the books are right."""
        sent = self.load.stop()
        eventually(lambda: self.watcher.visible() >= sent, f"all {sent} items came out", log=self.processes[0].log)
        self.settle()
        self.watcher.stop()
        assert not self.watcher.failures, self.watcher.failures
        self.explain(self.watcher.too_many)
        for process in self.processes:
            process.signal(signal.SIGTERM)
        for process in self.processes:
            assert process.wait() == 0, process.output()
        self.check()

    def abandon(self) -> None:
        """End what a failed test has left; the processes end with their nursery."""
        self.load.abandon()
        self.watcher.stop()

    @abstractmethod
    def explain(self, too_many: Mapping[int, list[tuple[int, int]]]) -> None:
        """Fail, unless the items whose outputs are too many were sent as often: the load's producer may repeat one.

        A record that a broker wrote and died over, before its producer had the answer: seen doubled in the source.
        """

    @abstractmethod
    def settle(self) -> None:
        """Wait until nothing is under way any more."""

    @abstractmethod
    def check(self) -> None:
        """Exactly once, in order, nothing left open."""


class MovingScene(Scene):
    """Its partitions have new leaders: a client that has asked before is refused with what it remembers of them."""

    def ends(self, topic: str, *, stable: bool) -> dict[int, int]:
        admin_client.cache_clear()
        return super().ends(topic, stable=stable)


class Chain(Flow):
    """A -> B -> C: three parts of most items, two crumbs of each part; two processes."""

    name = "transform"

    def __init__(self, brokers: Brokers, settings: Settings, nursery: Nursery, directory: Path, *, rate: float) -> None:
        self.scene = scene = MovingScene(settings, nursery, directory)
        self.load = Load(scene.servers, scene.a, self._item, rate=rate)
        partitions = scene.partitions[scene.c]
        self.watcher = Watcher(scene.servers, scene.c, partitions, item_of=_number, outputs=_crumbs)
        self.processes = []
        self.roles = {
            "leader of the target": lambda: brokers.leader_of(scene.b),
            "coordinator of transactions": lambda: brokers.coordinator_of_transactions(
                f"eo.transform.{scene.groups['pair']}.one"
            ),
            "coordinator of the group": lambda: brokers.coordinator_of_group(scene.groups["fan"]),
            "controller": brokers.controller,
        }

    def spawn(self, **environment: str) -> None:
        self.processes = [self.scene.spawn(EO_INSTANCE=name, **{**_BATCHES, **environment}) for name in ("one", "two")]

    def explain(self, too_many: Mapping[int, list[tuple[int, int]]]) -> None:
        if not too_many:
            return
        sent = Counter(_number(seen.value.encode()) for seen in self.scene.read(self.scene.a))
        for item, came in too_many.items():
            assert len(came) == sent[item] * _crumbs(item), f"item {item}, sent {sent[item]} times, came at {came}"
        self.scene.items = [again for item in self.scene.items for again in [item] * sent[item.n]]

    def settle(self) -> None:
        self.scene.reach_the_end(log=self.processes[0].log)

    def check(self) -> None:
        self.scene.check_end()
        assert not self.dead_letters()

    def dead_letters(self) -> list[object]:
        return [letter for group in self.scene.groups.values() for letter in self.scene.read(f"{group}.dlt")]

    def _item(self, n: int) -> tuple[bytes, bytes]:
        item = Item(key=f"k{n % KEYS}", n=n)
        self.scene.items.append(item)
        return item.key.encode(), item.model_dump_json().encode()


class Spine(Flow):
    """Entries booked into a ledger, and published by the relay; a worker and a relay."""

    name = "spine"

    def __init__(self, brokers: Brokers, settings: Settings, nursery: Nursery, directory: Path, *, rate: float) -> None:
        self.settings = settings
        self.engine = create_engine(settings.require_database_url())
        self.scene = scene = outages.Scene(
            brokers.services, nursery, self.engine, settings.require_database_url(), directory
        )
        with self.engine.begin() as connection:
            connection.execute(text(LEDGER))
        admin = Admin(settings)
        for topic in (scene.topic, scene.booked):
            admin.create(topic, partitions=outages.PARTITIONS, replicas=3, config={})
        assert scene.spawn("topics", "apply").wait() == 0
        servers = settings.require_bootstrap_servers()
        self.load = Load(servers, scene.topic, self._entry, rate=rate)
        self.watcher = Watcher(servers, scene.booked, outages.PARTITIONS, item_of=_number, outputs=lambda _: 1)
        self.processes = []
        outbox_id = scalar(self.engine, "SELECT id FROM eo.outbox")
        self.roles = {
            "leader of the source": lambda: brokers.leader_of(scene.topic),
            "leader of the target": lambda: brokers.leader_of(scene.booked),
            "coordinator of transactions": lambda: brokers.coordinator_of_transactions(transactional_id(outbox_id, 0)),
            "coordinator of the group": lambda: brokers.coordinator_of_group(f"ledger-{scene.topic}.book"),
            "controller": brokers.controller,
        }

    def spawn(self, **environment: str) -> None:
        self.processes = [self.scene.spawn(command, **environment) for command in ("run", "relay")]

    def explain(self, too_many: Mapping[int, list[tuple[int, int]]]) -> None:
        assert not too_many, too_many

    def settle(self) -> None:
        self.scene.sent = self.load.sent
        eventually(lambda: not self.left(), "empty outbox", log=self.processes[1].log)

    def left(self) -> int:
        return int(scalar(self.engine, "SELECT count(*) FROM eo.outbox_message"))

    def check(self) -> None:
        """Ledger rows, outbox messages and messages in the topic are as many as were sent, and the same ones."""
        self.scene.check_ledger()
        self.scene.check_published()
        assert not scalar(self.engine, "SELECT count(*) FROM eo.dead_letter")
        assert not scalar(self.engine, "SELECT count(*) FROM eo.parked_message")
        published = read_topic(self.settings.require_bootstrap_servers(), self.scene.booked)
        ids = Counter(dict(message.headers() or [])["ce_id"] for message in published)
        assert set(ids.values()) == {1}
        assert len(ids) == self.load.sent
        self.engine.dispose()

    @staticmethod
    def _entry(n: int) -> tuple[bytes, bytes]:
        key = f"k{n % outages.KEYS}"
        return key.encode(), json.dumps({"key": key, "n": n}).encode()


@contextmanager
def running(
    kind: type[Chain] | type[Spine],
    brokers: Brokers,
    database_url: str,
    directory: Path,
    *,
    rate: float,
    **environment: str,
) -> Iterator[Chain | Spine]:
    """A flow under load; at the end of the block all must have come out, and be right."""
    settings = make_settings(database_url, brokers.bootstrap_servers)
    with Nursery() as nursery:
        flow = kind(brokers, settings, nursery, directory, rate=rate)
        flow.spawn(**environment)
        try:
            flow.start()
            yield flow
            eventually(brokers.in_sync, "all replicas in sync")
            flow.finish()
        except BaseException:
            flow.abandon()
            raise


def _number(value: bytes) -> int:
    return int(json.loads(value)["n"])


def _crumbs(n: int) -> int:
    return len(parts_of(Item(key="", n=n))) * CRUMBS
