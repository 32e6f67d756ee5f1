"""The broker dies, freezes or forgets while handlers run; the same process goes on by itself."""

from __future__ import annotations

import signal
import threading

from tests.consume.nursery import Forked
from tests.outages.conftest import SESSION_TIMEOUT_MS, Scene
from tests.processes import eventually


def drained(*processes: Forked) -> None:
    for process in processes:
        process.signal(signal.SIGTERM)
    for process in processes:
        assert process.wait() == 0, process.output()


def test_broker_killed_and_restarted_under_load(scene: Scene) -> None:
    """Seen to fail with `_TRANSPORT` taken out of `_PASSING` in kafka/faults.py: exit 1 instead of going on."""
    worker, relay = scene.spawn(), scene.spawn("relay")
    sending = scene.send(2000, over=5)
    for mark in (100, 800):
        scene.reach(mark, worker)
        scene.own.kafka.restart()
    sending.join()
    scene.reach(2000, worker)
    scene.check_ledger()
    scene.check_published()
    drained(worker, relay)


def test_broker_frozen_longer_than_the_session_timeout(scene: Scene) -> None:
    """Seen to fail, in one of three runs, with `metadata.recovery.rebootstrap.trigger.ms` taken out of
    kafka/config.py: the broker says for a moment that there are no brokers, and nothing moves for 5 minutes.
    """
    worker = scene.spawn()
    sending = scene.send(1000, over=3)
    scene.reach(100, worker)
    scene.own.kafka.pause()
    threading.Event().wait(SESSION_TIMEOUT_MS / 1000 + 0.5)
    scene.own.kafka.resume()
    sending.join()
    scene.reach(1000, worker)
    scene.check_ledger()
    drained(worker)


def test_started_while_the_broker_is_away(scene: Scene) -> None:
    scene.send(50).join()
    scene.own.kafka.kill()
    try:
        worker = scene.spawn()
        eventually(lambda: "waiting for it" in worker.output(), "it says that it waits", log=worker.log)
    finally:
        scene.own.kafka.start()
    scene.reach(50, worker)
    drained(worker)


def test_stopped_while_the_broker_is_away(scene: Scene) -> None:
    """Everything is in the database; nobody has to wait for the broker to leave. Seen to fail with the offsets
    committed and the client closed on the worker's own thread (GroupConsumer.close): it takes 45 s.
    """
    # With nothing left to tell the group, as right after telling it, leaving takes no time at all.
    worker = scene.spawn(EO_OFFSET_COMMIT_INTERVAL="60")
    scene.send(200).join()
    scene.reach(200, worker)
    scene.own.kafka.kill()
    try:
        worker.signal(signal.SIGTERM)
        assert worker.wait(20) == 0, worker.output()
        assert "left the group" in worker.output()
    finally:
        scene.own.kafka.start()
    worker = scene.spawn()
    scene.send(100).join()
    scene.reach(300, worker)
    scene.check_ledger()
    drained(worker)
