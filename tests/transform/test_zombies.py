"""Members frozen beyond the transaction's and the session's timeout, and then woken up: they change nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.conftest import Addresses
from tests.consume.nursery import Forked
from tests.processes import eventually
from tests.transform.scene import Scene, open_stages

FREEZE_AT = {
    "with records in hand": "kafka.polled:3",
    "before its outputs are sent": "transform.handled:3",
    "with outputs under way": "transform.produced:3",
    "with outputs in the log": "kafka.transaction.flushed:5",
    "with offsets in the transaction": "kafka.transaction.offsets_sent:3",
    "at the commit": "kafka.transaction.committing:3",
    "after the commit": "kafka.transaction.committed:3",
    "after the batch": "transform.committed:3",
    "with a new producer under way": "kafka.producer.opening:1",
    "with the first offsets under way": "moving kafka.transaction.committing:1",
}
OPEN = ("with outputs in the log", "with offsets in the transaction", "at the commit")
"""Here the transaction is open and has records in the log: Kafka must abort it."""
NOTHING_OPEN = ("after the commit", "after the batch", "with a new producer under way")


@dataclass
class Takeover:
    """A frozen member, and the member that has done all the work since."""

    scene: Scene
    zombie: Forked
    successor: Forked


@pytest.fixture(scope="module")
def taken_over(
    services: Addresses, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Takeover]]:
    """All are frozen at once: each takes the group's session timeout to be given up, longer than the transaction's."""
    directory = tmp_path_factory.mktemp("zombies")
    with open_stages(services, template, directory) as stages:
        found = {}
        for where, point in FREEZE_AT.items():
            scene = stages.scene()
            scene.send(60)
            mark = directory / f"{scene.a}.frozen"
            zombie = scene.spawn(FREEZE_AT=point, FREEZE_MARK=str(mark), CRASH_IN=".fan")
            eventually(mark.exists, f"frozen {where}", log=zombie.log)
            found[where] = Takeover(scene, zombie, scene.spawn())
        for takeover in found.values():
            takeover.scene.reach_the_end(log=takeover.successor.log)
        yield found


@pytest.mark.parametrize("where", FREEZE_AT)
def test_a_zombie_changes_nothing_and_becomes_a_member_again(where: str, taken_over: dict[str, Takeover]) -> None:
    """Seen to fail with the group's offsets sent as nobody's (generation -1, no member), as the client itself does it
    after it was thrown out: outputs twice "with records in hand" and "with outputs under way". Elsewhere Kafka has
    ended the transaction by then, or the answer about the topic's id comes too late.
    """
    scene, zombie, successor = taken_over[where].scene, taken_over[where].zombie, taken_over[where].successor
    scene.check_end()
    if where in OPEN:
        assert scene.aborted(scene.b) > 0, "the test can fail"
    zombie.signal(signal.SIGCONT)
    eventually(lambda: len(scene.members("fan")) == 2, "the zombie is a member again", log=zombie.log)
    scene.send(60)
    scene.reach_the_end(log=zombie.log)
    for member in (zombie, successor):
        member.signal(signal.SIGTERM)
        assert member.wait() == 0, member.output()
    scene.check_end(console=where == "with offsets in the transaction")
    if where not in NOTHING_OPEN:
        assert "was given up" in zombie.output() or "wait; nothing is lost" in zombie.output()
