"""A member frozen while PostgreSQL sends it a large result: no timeout of the server ends that transaction."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.conftest import Addresses
from tests.consume.harness import scalar
from tests.consume.nursery import Nursery
from tests.consume.scene import open_scene
from tests.processes import eventually

SHORT = {"EO_IDLE_IN_TRANSACTION_TIMEOUT": "1", "EO_LOCK_TIMEOUT": "2", "EO_STATEMENT_TIMEOUT": "3"}
STUCK = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'SELECT /* large%'
    AND wait_event = 'ClientWrite'
"""


def test_a_backend_stuck_in_client_write_is_terminated_by_the_successor(
    services: Addresses, template: str, tmp_path: Path
) -> None:
    """Seen to fail with `_terminate_holder` taken out of Ownership._claim: after statement_timeout, idle timeout and
    lock_timeout the backend still held the row, and nobody could claim the partition.
    """
    with Nursery() as nursery, open_scene(services, template, nursery, tmp_path, partitions=1) as scene:
        scene.send(10)
        zombie = scene.spawn(LARGE_RESULT_AT="5", **SHORT)
        eventually(lambda: scalar(scene.engine, STUCK), "the server stuck in its write", log=zombie.log)
        successor = scene.spawn(**SHORT)
        scene.reach_the_end()
        assert "its backend was terminated" in successor.output()
        zombie.signal(signal.SIGCONT)
        eventually(lambda: "read from the position rows" in zombie.output(), "the zombie is told", log=zombie.log)
        scene.send(10)
        scene.reach_the_end()
        for member in (zombie, successor):
            member.signal(signal.SIGTERM)
            assert member.wait() == 0, member.output()
        scene.check()
