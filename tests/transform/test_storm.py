"""Members of a chain come, go, freeze and die every second or two; nothing is lost, repeated or overtaken."""

from __future__ import annotations

import random
import signal
import threading
from pathlib import Path

import pytest

from eoframework import clock
from tests.conftest import Addresses
from tests.consume.nursery import Forked
from tests.processes import eventually
from tests.transform.scene import Scene, open_stages

STORM_SECONDS = 30.0
MOST_MEMBERS = 4
PARTITIONS = 6
BACKLOG, PORTIONS, PORTION = 1_000, 10, 20
"""So many items are there from the beginning, the others come in portions: members always have a transaction open."""

PROTOCOLS = {
    "consumer": {"EO_GROUP_PROTOCOL": "consumer"},
    "cooperative": {
        "EO_GROUP_PROTOCOL": "classic",
        "EO_KAFKA_SESSION_TIMEOUT_MS": "3000",
        "EO_TRANSFORM_TRANSACTION_TIMEOUT": "2.5",
        "EO_TRANSFORM_MESSAGE_TIMEOUT": "2",
    },
}


class Storm:
    """Members of the chain's groups, and what befalls them."""

    def __init__(self, scene: Scene, environment: dict[str, str], seed: int) -> None:
        self._scene = scene
        self._environment = environment
        self._random = random.Random(seed)
        self.alive: list[Forked] = []
        self._frozen: list[tuple[float, Forked]] = []
        self.happened: list[str] = []

    def join(self) -> None:
        self.alive.append(self._scene.spawn(**self._environment))
        self.happened.append("join")

    def leave(self) -> None:
        """SIGTERM: ends its transaction and leaves the group."""
        member = self._take()
        eventually(member.output, "the first line of a member, which by then minds signals")
        member.signal(signal.SIGTERM)
        assert member.wait() == 0, member.output()
        self.happened.append("leave")

    def die(self) -> None:
        member = self._take()
        member.signal(signal.SIGKILL)
        assert member.wait() == -signal.SIGKILL, member.output()
        self.happened.append("die")

    def freeze(self) -> None:
        """SIGSTOP, for less than the session timeout or for more."""
        member = self._take()
        member.signal(signal.SIGSTOP)
        self._frozen.append((clock.monotonic() + self._random.choice((1.0, 4.0, 9.0)), member))
        self.happened.append("freeze")

    def rage(self, seconds: float) -> None:
        """Every second or two something happens to somebody; at least one member is always there."""
        deadline = clock.monotonic() + seconds
        while clock.monotonic() < deadline:
            self._thaw(clock.monotonic())
            if len(self.alive) < 2:
                self.join()
            elif len(self.alive) >= MOST_MEMBERS:
                self._random.choice((self.leave, self.die, self.freeze))()
            else:
                self._random.choice((self.join, self.leave, self.die, self.freeze))()
            clock.sleep(self._random.uniform(0.7, 1.7))
        self._thaw(float("inf"))

    def end(self) -> None:
        """Everybody leaves in order, whatever they went through."""
        while self.alive:
            self.leave()

    def _thaw(self, now: float) -> None:
        for until, member in [one for one in self._frozen if one[0] <= now]:
            self._frozen.remove((until, member))
            member.signal(signal.SIGCONT)
            self.alive.append(member)

    def _take(self) -> Forked:
        return self.alive.pop(self._random.randrange(len(self.alive)))


def send_steadily(scene: Scene) -> threading.Thread:
    """The portions, spread over the length of the storm."""

    def send() -> None:
        for _ in range(PORTIONS):
            scene.send(PORTION)
            clock.sleep(STORM_SECONDS / PORTIONS)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_outputs_once_and_in_order_while_members_come_go_freeze_and_die(
    protocol: str, services: Addresses, template: str, tmp_path: Path
) -> None:
    """Seen to fail with the group's offsets in a Kafka transaction of their own after that of the outputs
    (`Transformer._commit`): outputs twice.
    """
    environment = {**PROTOCOLS[protocol], "CHAIN_LINGER": "0.1"}
    with open_stages(services, template, tmp_path) as stages:
        scene = stages.scene(partitions=PARTITIONS)
        storm = Storm(scene, environment, seed=len(protocol))
        scene.send(BACKLOG)
        sending = send_steadily(scene)
        storm.join()
        storm.rage(STORM_SECONDS)
        sending.join()
        storm.join()
        scene.reach_the_end()
        storm.end()
        assert {"join", "leave", "die", "freeze"} <= set(storm.happened)
        scene.check_end(console=True)
        assert scene.aborted(scene.b) + scene.aborted(scene.c) > 0, "the test can fail"
