"""`--once` after a crash: the group holds the dead member's share back for a while, and it is waited for."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.conftest import Addresses
from tests.consume.harness import scalar
from tests.consume.nursery import Nursery
from tests.consume.scene import open_scene
from tests.processes import eventually


def test_once_waits_for_what_a_killed_member_had(services: Addresses, template: str, tmp_path: Path) -> None:
    """Seen to fail without `Rest` in ConsumeWorker.drained: it ended with 0 and half of the messages unread."""
    owners = "SELECT count(DISTINCT owner) FROM eo.position"
    with Nursery() as nursery, open_scene(services, template, nursery, tmp_path) as scene:
        killed, stopped = scene.spawn(), scene.spawn()
        eventually(lambda: scalar(scene.engine, owners) == 2, "each has a partition", log=stopped.log)
        killed.signal(signal.SIGKILL)
        stopped.signal(signal.SIGTERM)
        assert (killed.wait(), stopped.wait()) == (-signal.SIGKILL, 0)
        scene.send(40)
        successor = scene.spawn("--once")
        assert successor.wait() == 0, successor.output()
        scene.check()
