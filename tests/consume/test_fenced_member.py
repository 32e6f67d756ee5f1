"""A static member whose name another process has taken: its client is broken for good, and says so only once."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Addresses
from tests.consume.nursery import Nursery
from tests.consume.scene import open_scene
from tests.processes import eventually

STATIC = {
    "EO_GROUP_PROTOCOL": "classic",
    "EO_KAFKA_GROUP_INSTANCE_ID": "one",
    "EO_KAFKA_SESSION_TIMEOUT_MS": "6000",
    "EO_KAFKA_HEARTBEAT_INTERVAL_MS": "500",
}
# A session as long as the pause between two heartbeats: it runs out by itself.
TOO_SHORT = {**STATIC, "EO_KAFKA_SESSION_TIMEOUT_MS": "3000", "EO_KAFKA_HEARTBEAT_INTERVAL_MS": "3000"}
RESTART = 75


def test_a_member_that_was_fenced_ends(services: Addresses, template: str, tmp_path: Path) -> None:
    """Seen to fail without `_FATAL` in `_ends_with`: the client says so once, and the worker stood still for ever, as
    if there were nothing to read.
    """
    with Nursery() as nursery, open_scene(services, template, nursery, tmp_path) as scene:
        scene.send(20)
        worker = scene.spawn(**STATIC)
        eventually(lambda: scene.count_booked() == 20, "20 booked", log=worker.log)
        another = scene.spawn(**STATIC)
        assert worker.wait(25) == RESTART, worker.output()
        assert "fenced" in worker.output()
        scene.send(20)
        eventually(lambda: scene.count_booked() == 40, "40 booked", log=another.log)


def test_a_member_that_was_fenced_after_its_session_ends(services: Addresses, template: str, tmp_path: Path) -> None:
    """Its name is still the group's when it comes back. Seen to fail without `_ends_with` in `_refuse_lost_log`:
    the client says so in the very poll in which it gives its partitions up.
    """
    with Nursery() as nursery, open_scene(services, template, nursery, tmp_path) as scene:
        scene.send(20)
        worker = scene.spawn(**TOO_SHORT)
        assert worker.wait(60) == RESTART, worker.output()
        assert "fenced" in worker.output()
