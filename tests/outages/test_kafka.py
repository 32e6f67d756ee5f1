"""The broker dies, freezes or forgets while handlers run; the same process goes on by itself."""

from __future__ import annotations

import signal
import threading

from tests.consume.nursery import Forked
from tests.outages.conftest import SESSION_TIMEOUT_MS, Scene


def drained(*processes: Forked) -> None:
    for process in processes:
        process.signal(signal.SIGTERM)
    for process in processes:
        assert process.wait() == 0, process.output()


def test_broker_killed_and_restarted_under_load(scene: Scene) -> None:
    """Seen to fail with the Retryable case taken out of Ownership.assigned: exit 75 instead of going on."""
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


def test_stopped_while_the_broker_is_away(scene: Scene) -> None:
    """Everything is in the database; nobody has to wait for the broker to leave."""
    worker = scene.spawn()
    scene.send(200).join()
    scene.reach(200, worker)
    scene.own.kafka.kill()
    try:
        drained(worker)
    finally:
        scene.own.kafka.start()
    worker = scene.spawn()
    scene.send(100).join()
    scene.reach(300, worker)
    scene.check_ledger()
    drained(worker)
