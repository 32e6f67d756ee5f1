"""SIGKILL and SIGSTOP at every boundary of a message that fails: parked, charged, due, unparked, dead."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import pytest

from tests.conftest import Addresses
from tests.consume.nursery import Forked, Nursery
from tests.failure.stormy import Stormy, end, open_storm, stopped
from tests.processes import eventually

# Of one key: one that is tried again, one that dies, one behind each; and some of other keys. The very first one fails,
# so that whoever dies of a batch with it has moved its partition nowhere.
FATES = dict.fromkeys((0, 3, 13, 20, 41), "flaky") | dict.fromkeys((8, 27, 28, 45), "poison")
MESSAGES = 60

KILLED_AT = [
    "settled:1",
    "settled.committing:1",
    "settled.committed:1",
    "due:1",
    "due.committing:1",
    "unparked:1",
    "dead:1",
    "dead.committing:1",
    "dead.committed:1",
    "dead.committed:3",
]
AFTER_TWO_DEATHS = ["charged:1", "charged:5"]
BETWEEN = ["unparked:1", "dead.committed:1"]
FROZEN_AT = ["settled:1", "settled.committing:2", "due:1", "due.committing:2", "dead.committing:1", *BETWEEN]
SHORT = {"EO_IDLE_IN_TRANSACTION_TIMEOUT": "2", "EO_LOCK_TIMEOUT": "15"}


@dataclass
class Crash:
    """A stage, and how its processes ended."""

    scene: Stormy
    deaths: list[int]


@pytest.fixture(scope="module")
def crashed(services: Addresses, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Crash]]:
    """All crashes and restarts at once: each restart waits for the group to notice the death."""
    directory = tmp_path_factory.mktemp("boundaries")
    with Nursery() as nursery, ExitStack() as stack:
        found = {}
        for point in KILLED_AT + AFTER_TWO_DEATHS:
            scene = stack.enter_context(open_storm(services, template, nursery, directory))
            scene.send(MESSAGES, FATES)
            found[point] = Crash(scene, [])
        for deaths in range(3):
            victims = {}
            for point in found if deaths == 0 else AFTER_TWO_DEATHS:
                earlier = point in AFTER_TWO_DEATHS and deaths < 2
                victims[point] = found[point].scene.spawn(STORM_AT="settled:1" if earlier else point)
            for point, victim in victims.items():
                found[point].deaths.append(victim.wait())
        successors = [crash.scene.spawn() for crash in found.values()]
        for crash in found.values():
            eventually(crash.scene.settled, "nothing is left to do", seconds=60)
        for successor in successors:
            successor.signal(signal.SIGTERM)
        for successor in successors:
            assert successor.wait() == 0, successor.output()
        yield found


@pytest.mark.parametrize("point", KILLED_AT + AFTER_TWO_DEATHS)
def test_killed_and_restarted(point: str, crashed: dict[str, Crash]) -> None:
    """Every message has its effect once and in its key's order, or is dead once; nothing is left parked.

    Seen to fail with what is parked, or buried, or removed from its lane, in a transaction of its own, and without
    `inherited` in Executor._forget_attempts ("charged": the mark of its death was left for ever).
    """
    crash = crashed[point]
    assert crash.deaths == [-signal.SIGKILL] * (3 if point in AFTER_TWO_DEATHS else 1)
    crash.scene.check()


@dataclass
class Takeover:
    """A frozen member, and the member that has done everything meanwhile."""

    scene: Stormy
    zombie: Forked
    successor: Forked


@pytest.fixture(scope="module")
def taken_over(
    services: Addresses, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Takeover]]:
    directory = tmp_path_factory.mktemp("frozen")
    with Nursery() as nursery, ExitStack() as stack:
        found = {}
        for point in FROZEN_AT:
            scene = stack.enter_context(open_storm(services, template, nursery, directory, partitions=1))
            scene.send(MESSAGES, FATES)
            found[point] = (scene, scene.spawn(STORM_FREEZE=point, **SHORT))
        members = {}
        for point, (scene, zombie) in found.items():
            eventually(partial(stopped, zombie), f"frozen at {point}", log=zombie.log)
            members[point] = Takeover(scene, zombie, scene.spawn(**SHORT))
        for takeover in members.values():
            eventually(takeover.scene.settled, "nothing is left to do", seconds=60)
        yield members


@pytest.mark.parametrize("point", FROZEN_AT)
def test_frozen_and_woken_up(point: str, taken_over: dict[str, Takeover]) -> None:
    """The successor has run, parked and buried everything while the zombie was frozen; woken up it changes nothing.

    Frozen between two transactions it finds out as soon as it asks; that it could not write before is shown on the rig
    (test_parking.py, test_a_zombie_can_neither_park_nor_drain).
    Seen to fail with `idle` in unit_of_work's `_SETTINGS` set to 0: the frozen transaction held the partition.
    """
    takeover = taken_over[point]
    scene, zombie = takeover.scene, takeover.zombie
    scene.check()
    assert "beyond lock_timeout" not in takeover.successor.output(), "the frozen transaction outlived the idle timeout"
    zombie.signal(signal.SIGCONT)
    told = "fenced on partitions [0]" if point in BETWEEN else "read from the position rows"
    eventually(lambda: told in zombie.output(), f"the zombie says: {told}", log=zombie.log)
    scene.check()
    scene.send(20, {63: "flaky", 65: "poison"})
    eventually(scene.settled, "nothing is left to do")
    for member in (zombie, takeover.successor):
        end(member)
    scene.check()
