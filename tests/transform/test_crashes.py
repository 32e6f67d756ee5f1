"""SIGKILL at every boundary of a transform's batch, and a restart: each output once, in order, never half of them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.conftest import Addresses
from tests.transform.scene import STAGES, Scene, Stage, open_stages

BOUNDARIES = (
    "kafka.polled",
    "transform.handled",
    "transform.produced",
    "kafka.transaction.flushed",
    "kafka.transaction.offsets_sent",
    "kafka.transaction.committing",
    "kafka.transaction.committing+",
    "kafka.transaction.committed",
    "transform.committed",
)
# The first hit in one stage of the chain, a later one in the other.
POINTS = {
    **{f"{name}:1 in fan": (f"{name}:1", "fan") for name in BOUNDARIES},
    **{f"{name}:4 in pair": (f"{name}:4", "pair") for name in BOUNDARIES},
    "moving the first offsets": ("moving kafka.transaction.committing:1", "fan"),
    "noting the take-over": ("moving kafka.transaction.committed:2", "fan"),
}
IN_THE_LOG = ("kafka.transaction.flushed", "kafka.transaction.offsets_sent", "kafka.transaction.committing")
"""Here the outputs are in the log, and nobody has committed them."""
CONSOLE = "kafka.transaction.offsets_sent:1 in fan"
"""What the broker's own consumer reads, too."""


@dataclass
class Crash:
    """A scene, and how its processes ended."""

    scene: Scene
    stage: Stage
    death: int
    passed_at_death: int
    torn: AssertionError | None
    """What was half there while nobody ran."""
    ends: dict[str, int]


@pytest.fixture(scope="module")
def crashed(services: Addresses, template: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Crash]]:
    """All crashes and restarts at once: each restart waits for the group to notice the death, seconds each."""
    directory = tmp_path_factory.mktemp("crashes")
    with open_stages(services, template, directory) as stages, ThreadPoolExecutor(4) as pool:
        scenes = {point: stages.scene() for point in POINTS}
        list(pool.map(lambda scene: scene.send(60), scenes.values()))
        victims = {
            point: scenes[point].spawn(CRASH_AT=at, CRASH_IN=f".{stage}") for point, (at, stage) in POINTS.items()
        }
        deaths = {point: victim.wait() for point, victim in victims.items()}
        passed = {p: sum(scenes[p].committed(stage).values()) for p, (_, stage) in POINTS.items()}
        torn = dict(zip(scenes, pool.map(_torn, scenes.values()), strict=True))
        ends: dict[str, dict[str, int]] = {point: {} for point in POINTS}
        for stage in STAGES:
            # One after the other: `pair` would be done before `fan` has begun.
            successors = {p: scene.spawn("--once", "--handler", stage) for p, scene in scenes.items()}
            for point, successor in successors.items():
                ends[point][stage] = successor.wait()
        yield {p: Crash(scenes[p], POINTS[p][1], deaths[p], passed[p], torn[p], ends[p]) for p in POINTS}


def _torn(scene: Scene) -> AssertionError | None:
    try:
        scene.check_now()
    except AssertionError as error:
        return error
    return None


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_restarted_each_output_is_there_once(point: str, crashed: dict[str, Crash]) -> None:
    """Seen to fail with the group's offsets in a Kafka transaction of their own after that of the outputs
    (`Transformer._commit`): outputs without their offsets, and then twice, at offsets_sent, committing and committed.
    """
    crash = crashed[point]
    name, _, hit = POINTS[point][0].partition(":")
    assert crash.death == -signal.SIGKILL
    if not name.startswith("moving") and not name.endswith("+"):
        batches = int(hit) - (not name.endswith("committed"))
        most = batches * 10 if crash.stage == "fan" else crash.passed_at_death
        assert min(batches, 1) <= crash.passed_at_death <= most, "what was committed before the kill"
    if crash.torn is not None:
        raise crash.torn
    assert crash.ends == dict.fromkeys(STAGES, 0)
    if name in IN_THE_LOG:
        assert crash.scene.aborted(crash.scene.b if crash.stage == "fan" else crash.scene.c) > 0, "the test can fail"
    crash.scene.check_end(console=point == CONSOLE)
