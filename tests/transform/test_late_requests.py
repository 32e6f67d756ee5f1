"""A request of one Kafka transaction that arrives in the middle of the next: the quarantine's work.

On a broker of our own, whose clients all go through a proxy. Each late request comes with the quarantine and without:
without it the harm is to be seen, or the broker's own answer, read off the wire, says why there is none.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from eoframework import dev
from eoframework.dev import processes
from tests.conftest import Addresses, database_to_copy
from tests.consume.nursery import Forked
from tests.processes import eventually
from tests.protocol_proxy import LateEndTxn, LateOffsets, ProtocolProxy
from tests.transform.scene import STAGES, Scene, Stages, open_stages

NO_QUARANTINE = {"CHAIN_PATIENCE": "inf"}


@dataclass(frozen=True)
class Own:
    """Services that nobody else uses; every client of the broker goes through the proxy."""

    stages: Stages
    proxy: ProtocolProxy


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    directory = tmp_path_factory.mktemp("late")
    broker_port = processes.free_port()
    proxy_port = processes.free_port(avoid=[broker_port])
    proxy = ProtocolProxy(proxy_port, ("127.0.0.1", broker_port))
    proxy.start()
    properties = {"advertised.listeners": f"PLAINTEXT://127.0.0.1:{proxy_port}"}
    options = dev.KafkaOptions(port=broker_port, properties=properties)
    with dev.start(directory / ".eo", kafka=options) as services:
        addresses = Addresses(services.database_url, f"127.0.0.1:{proxy_port}")
        with database_to_copy(addresses) as template, open_stages(addresses, template, directory) as stages:
            yield Own(stages, proxy)
    proxy.close()


@pytest.fixture
def proxy(own: Own) -> Iterator[ProtocolProxy]:
    yield own.proxy
    own.proxy.make_late(None)


def drain(scene: Scene) -> None:
    """What a worker that starts now makes of it, in both stages."""
    for stage in STAGES:
        worker = scene.spawn("--once", "--handler", stage)
        assert worker.wait() == 0, worker.output()


def stop(worker: Forked) -> None:
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.output()


def passed(scene: Scene) -> int:
    return sum(scene.committed("fan").values())


def lost_and_repeated(scene: Scene) -> tuple[int, int]:
    """Parts that are missing, and parts that are there more often than they should be."""
    scene.no_transaction_open(scene.b)
    found = Counter(one.value for one in scene.read(scene.b))
    expected = Counter(value for _, value in scene.expected_parts())
    return (expected - found).total(), (found - expected).total()


# --- the group's offsets ----------------------------------------------------------------------------------------------


def offsets_come_late(own: Own, **environment: str) -> Scene:
    """The offsets of one transaction arrive in the next, after that one's own; then the worker stops."""
    scene = own.stages.scene(partitions=1)
    scene.send(20)
    worker = scene.spawn("--handler", "fan", **environment)
    eventually(scene.fan_done, "the first items", log=worker.log)
    own.proxy.make_late(LateOffsets())
    scene.send(1)
    eventually(scene.fan_done, "one more item", log=worker.log)
    scene.send(1)
    eventually(lambda: own.proxy.delivered == 1, "the offsets arrive", log=worker.log)
    scene.no_transaction_open(scene.b)
    own.proxy.make_late(None)
    stop(worker)
    return scene


def test_late_offsets_change_nothing(own: Own, proxy: ProtocolProxy) -> None:
    """The rule at work; `test_late_offsets_without_the_rule` shows what it is for."""
    scene = offsets_come_late(own)
    assert proxy.answers == ["INVALID_PRODUCER_EPOCH"]
    assert passed(scene) == 22
    drain(scene)
    scene.check_end()


def test_late_offsets_without_the_rule(own: Own, proxy: ProtocolProxy) -> None:
    """With infinite patience (`_QUARANTINE_SHARE`) the same network moves the group back by one transaction, and who
    begins there next sends its outputs again.
    """
    scene = offsets_come_late(own, **NO_QUARANTINE)
    assert proxy.answers == ["NONE"]
    assert passed(scene) == 21
    drain(scene)
    assert lost_and_repeated(scene) == (0, 3)


# --- EndTxn -----------------------------------------------------------------------------------------------------------


def commit_comes_late(own: Own, **environment: str) -> Scene:
    """The commit of one transaction arrives in the next, between its records."""
    scene = own.stages.scene(partitions=1, into=3)
    scene.send(20)
    worker = scene.spawn("--handler", "fan", **environment)
    eventually(scene.fan_done, "the first items", log=worker.log)
    own.proxy.make_late(LateEndTxn("commit", times=1))
    scene.send(1)
    eventually(scene.fan_done, "one more item", log=worker.log)
    scene.send(30)
    eventually(scene.fan_done, "all items", log=worker.log)
    eventually(lambda: own.proxy.delivered == 1, "the commit arrives", log=worker.log)
    stop(worker)
    return scene


def test_late_commit_tears_nothing(own: Own, proxy: ProtocolProxy) -> None:
    """The rule at work; `test_late_commit_without_the_rule` shows what it is for."""
    scene = commit_comes_late(own)
    assert proxy.answers == ["INVALID_PRODUCER_EPOCH"]
    drain(scene)
    scene.check_end()


def test_late_commit_without_the_rule(own: Own, proxy: ProtocolProxy) -> None:
    """With infinite patience (`_QUARANTINE_SHARE`) the same network repeats outputs: part of a batch is committed by
    the late EndTxn, without the group's offsets; the rest fails, and the batch runs again.
    """
    scene = commit_comes_late(own, **NO_QUARANTINE)
    assert proxy.answers == ["NONE"]
    lost, repeated = lost_and_repeated(scene)
    assert (lost, repeated > 0) == (0, True)


def abort_comes_late(own: Own, directory: Path, **environment: str) -> Scene:
    """A transaction fails; its abort arrives in the next, between its records and its offsets."""
    scene = own.stages.scene(partitions=1, into=3)
    scene.send(20)
    fails = directory / "fails"
    worker = scene.spawn("--handler", "fan", CHAIN_FAIL_ONCE=str(fails), **environment)
    eventually(scene.fan_done, "the first items", log=worker.log)
    own.proxy.make_late(LateEndTxn("abort", before="offsets", times=1))
    fails.touch()
    scene.send(10)
    eventually(scene.fan_done, "all items", log=worker.log)
    eventually(lambda: own.proxy.delivered == 1, "the abort arrives", log=worker.log)
    stop(worker)
    return scene


def test_late_abort_loses_nothing(own: Own, proxy: ProtocolProxy, tmp_path: Path) -> None:
    """The rule at work; `test_late_abort_without_the_rule` shows what it is for."""
    scene = abort_comes_late(own, tmp_path)
    assert proxy.answers == ["INVALID_PRODUCER_EPOCH"]
    drain(scene)
    scene.check_end()


def test_late_abort_without_the_rule(own: Own, proxy: ProtocolProxy, tmp_path: Path) -> None:
    """With the producer kept after an abort the same network loses outputs without any error: the late EndTxn aborts
    them, the group's offsets open a fresh transaction, and are committed alone.
    """
    scene = abort_comes_late(own, tmp_path, CHAIN_KEEP_AFTER_ABORT="1", **NO_QUARANTINE)
    assert proxy.answers == ["NONE"]
    lost, repeated = lost_and_repeated(scene)
    assert (lost > 0, repeated) == (True, 0)
