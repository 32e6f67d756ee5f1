"""The three brokers take over from each other, clients notice nothing of it, and we are told rightly who leads."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable

import pytest
from confluent_kafka import KafkaError, Producer
from confluent_kafka.admin import AdminClient, ConfigResource

from eoframework import dev
from eoframework.errors import Retryable
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.cluster.brokers import Brokers
from tests.processes import contiguous, eventually, read_topic

MakeTopic = Callable[..., str]
PARTITIONS = 6


class Load:
    """An idempotent producer that never stops, and one transaction after the other of two records each."""

    def __init__(self, bootstrap_servers: str, plain: str, transactional: str) -> None:
        self._topics = plain, transactional
        # By default a client waits 60 s for the answer of a frozen broker.
        patience = {"socket.timeout.ms": 4000, "request.timeout.ms": 3000, "reconnect.backoff.max.ms": 500}
        client = {"bootstrap.servers": bootstrap_servers, "linger.ms": 5, **patience}
        self._plain = Producer({**client, "enable.idempotence": True})
        self._transactional = Producer({**client, "transactional.id": f"load.{uuid.uuid4().hex[:8]}"})
        self._stop = threading.Event()
        self.acknowledged = self.committed = 0
        self.failures: list[KafkaError | str] = []
        self._threads = [threading.Thread(target=work) for work in (self._send, self._commit)]

    def __enter__(self) -> Load:
        self._transactional.init_transactions(30)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def goes_on(self) -> None:
        """Wait for what begins now: records acknowledged and transactions committed."""
        acknowledged, committed = self.acknowledged + 200, self.committed + 5
        eventually(
            lambda: (self.acknowledged >= acknowledged and self.committed >= committed) or self.failures,
            "records are acknowledged and transactions committed",
        )
        assert not self.failures, self.failures

    def _send(self) -> None:
        sent = 0
        while not self._stop.wait(0.002) and sent - self.acknowledged < 50_000:
            self._plain.produce(self._topics[0], b"%d" % sent, on_delivery=self._delivered)
            self._plain.poll(0)
            sent += 1
        if self._plain.flush(60):
            self.failures.append("not flushed")

    def _delivered(self, error: KafkaError | None, _: object) -> None:
        if error is None:
            self.acknowledged += 1
        else:
            self.failures.append(error)

    def _commit(self) -> None:
        while not self._stop.wait(0.02):
            self._transactional.begin_transaction()
            for number in (2 * self.committed, 2 * self.committed + 1):
                self._transactional.produce(self._topics[1], b"%d" % number)
            self._transactional.commit_transaction(60)
            self.committed += 1


class Asking:
    """Asks for the ends of a log, for ever: a worker that claims a partition does."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self._admin, self._topic = Admin(Settings.load(kafka_bootstrap_servers=bootstrap_servers)), topic
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self.told = [0] * PARTITIONS
        self.wrong: list[object] = []

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def goes_on(self) -> None:
        """Wait until those of all partitions were told again."""
        before = list(self.told)
        eventually(
            lambda: all(now > then for now, then in zip(self.told, before, strict=True)) or self.wrong,
            "the log's ends are told",
            seconds=40,
        )
        assert not self.wrong

    def _ask(self) -> None:
        while not self._stop.wait(0.05):
            for partition in range(PARTITIONS):
                try:
                    ends = self._admin.watermarks(self._topic, partition)
                except Retryable:
                    continue  # asked again, as a worker does
                except Exception as error:  # noqa: BLE001 - shown by the test
                    self.wrong.append(error)
                else:
                    self.told[partition] += ends == (0, 0)
                    self.wrong += [ends] if ends != (0, 0) else []


def numbers(brokers: Brokers, topic: str) -> list[int]:
    return [int(message.value() or b"") for message in read_topic(brokers.bootstrap_servers, topic)]


def test_each_killed_in_turn_under_load(brokers: Brokers, make_topic: MakeTopic) -> None:
    """Each of them is leader, coordinator and controller for somebody when it dies. Seen to fail with a replication
    factor of 1 for the transactions' topic in dev/kafka_properties.py: no transaction commits while its broker is away.

    And in kafka/admin.py without `_look_around` before the second question: refused for minutes, or "No leaders found",
    taken for final; and, not every time, without `offset < 0`: a log from -1001 to -1001.
    """
    plain, transactional = make_topic(), make_topic()
    with (
        Load(brokers.bootstrap_servers, plain, transactional) as load,
        Asking(brokers.bootstrap_servers, make_topic(partitions=PARTITIONS)) as asking,
    ):
        load.goes_on()
        asking.goes_on()
        for node in brokers.nodes:
            node.kill()
            load.goes_on()
            asking.goes_on()
            node.start()
            eventually(brokers.in_sync, f"{node.name} in sync again")
        load.goes_on()
        asking.goes_on()
    assert not load.failures
    assert contiguous(numbers(brokers, plain), load.acknowledged)
    assert contiguous(numbers(brokers, transactional), 2 * load.committed)


def test_topics_are_replicated_by_default(brokers: Brokers) -> None:
    """What the brokers made by themselves: three replicas each, and acks=all means at least two."""
    admin = AdminClient({"bootstrap.servers": brokers.bootstrap_servers})
    topics = admin.list_topics(timeout=10).topics
    assert {"eo.dev.probe", "__transaction_state"} <= set(topics)
    assert {len(partition.replicas) for topic in topics.values() for partition in topic.partitions.values()} == {3}
    for name in ("eo.dev.probe", "__transaction_state"):
        resource = ConfigResource(ConfigResource.Type.TOPIC, name)
        assert admin.describe_configs([resource])[resource].result(10)["min.insync.replicas"].value == "2"


def test_the_frozen_ones_roles_go_to_another(brokers: Brokers, make_topic: MakeTopic) -> None:
    """SIGSTOP for longer than the brokers wait for each other, of the one that leads the controllers too."""
    plain, transactional = make_topic(partitions=3), make_topic()
    with Load(brokers.bootstrap_servers, plain, transactional) as load:
        load.goes_on()
        frozen = brokers.controller()
        assert frozen in leaders(brokers, plain)
        frozen.pause()
        eventually(lambda: brokers.awake() == brokers.others(frozen), f"{frozen.name} is frozen")
        eventually(
            lambda: frozen not in {*leaders(brokers, plain), *others_in_charge(brokers)},
            f"{frozen.name} is in charge of nothing",
        )
        load.goes_on()
        frozen.resume()
        eventually(brokers.in_sync, f"{frozen.name} in sync again")
    assert not load.failures
    assert contiguous(sorted(numbers(brokers, plain)), load.acknowledged)
    assert contiguous(numbers(brokers, transactional), 2 * load.committed)


def leaders(brokers: Brokers, topic: str) -> set[dev.KafkaBroker]:
    return {brokers.leader_of(topic, partition) for partition in range(3)}


def others_in_charge(brokers: Brokers) -> set[dev.KafkaBroker]:
    names = (f"name{number}" for number in range(10))
    coordinators = {brokers.coordinator_of_group(name) for name in names}
    return {brokers.controller(), *coordinators, brokers.coordinator_of_transactions("some.id")}


@pytest.mark.parametrize("name", ["some.group", "another.group", "x"])
def test_coordinators_lead_the_partition_of_the_name(brokers: Brokers, name: str) -> None:
    """Kafka's rule, from the name's hash: https://kafka.apache.org/documentation/#impl_offsettracking."""
    partition = abs(java_hash(name)) % 3
    assert brokers.coordinator_of_group(name) is brokers.leader_of("__consumer_offsets", partition)
    assert brokers.coordinator_of_transactions(name) is brokers.leader_of("__transaction_state", partition)


def java_hash(text: str) -> int:
    value = 0
    for character in text.encode():
        value = (31 * value + character) & 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value
