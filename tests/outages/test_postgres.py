"""The database dies and comes back while handlers run; the same process goes on by itself."""

from __future__ import annotations

from tests.outages.conftest import Scene
from tests.outages.test_kafka import drained


def test_server_stopped_immediate_and_restarted_under_load(scene: Scene) -> None:
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
