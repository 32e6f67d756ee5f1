"""The database dies and comes back while handlers run; the same process goes on by itself."""

from __future__ import annotations

import signal

from tests.consume.harness import scalar
from tests.outages.conftest import Scene
from tests.outages.test_kafka import drained
from tests.processes import eventually


def test_server_stopped_immediate_and_restarted_under_load(scene: Scene) -> None:
    """Seen to fail with `_connection_is_gone` out of classify in db/faults.py: the worker ends, as at an error of its
    own.
    """
    worker, relay = scene.spawn(), scene.spawn("relay")
    sending = scene.send(2000, over=5)
    for mark in (100, 800):
        scene.reach(mark, worker)
        scene.own.postgres.stop(mode="immediate")
        scene.own.postgres.start()
    sending.join()
    scene.reach(2000, worker)
    scene.check_ledger()
    scene.check_published()
    drained(worker, relay)


def test_partitions_assigned_while_the_server_is_away(scene: Scene) -> None:
    """They are claimed from the worker's loop, as soon as there is a database to claim them in. Seen to fail with
    `except Retryable` taken out of Ownership.assigned.
    """
    survivor, other = scene.spawn(), scene.spawn()
    scene.send(400).join()
    scene.reach(400, survivor)
    owners = "SELECT count(DISTINCT owner) FROM eo.position"
    eventually(lambda: scalar(scene.engine, owners) == 2, "both have partitions", log=other.log)
    scene.own.postgres.stop(mode="immediate")
    try:
        other.signal(signal.SIGKILL)
        other.wait()
        eventually(lambda: "not claimed yet" in survivor.output(), "assigned without a claim", log=survivor.log)
    finally:
        scene.own.postgres.start()
    scene.send(400).join()
    scene.reach(800, survivor)
    scene.check_ledger()
    drained(survivor)


def test_started_while_the_server_is_away(scene: Scene) -> None:
    scene.send(50).join()
    scene.own.postgres.stop(mode="immediate")
    try:
        worker = scene.spawn()
        eventually(lambda: "waiting for it" in worker.output(), "it says that it waits", log=worker.log)
    finally:
        scene.own.postgres.start()
    scene.reach(50, worker)
    drained(worker)
