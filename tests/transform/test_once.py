"""`--once` after a crash: the group holds the dead member's share back for a while, and it is waited for."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.conftest import Addresses
from tests.processes import eventually
from tests.transform.scene import open_stages


def test_once_waits_for_what_a_killed_member_had(services: Addresses, template: str, tmp_path: Path) -> None:
    """Seen to fail without `Rest` in TransformWorker.drained: it ended with 0 and half of the items unread."""
    with open_stages(services, template, tmp_path) as stages:
        scene = stages.scene()
        killed, stopped = (scene.spawn("--handler", "fan") for _ in range(2))
        eventually(lambda: scene.shares("fan") == [1, 1], "each has a partition", log=stopped.log)
        killed.signal(signal.SIGKILL)
        stopped.signal(signal.SIGTERM)
        assert (killed.wait(), stopped.wait()) == (-signal.SIGKILL, 0)
        scene.send(40)
        successor = scene.spawn("--once", "--handler", "fan")
        assert successor.wait() == 0, successor.output()
        assert scene.fan_done(), successor.output()
