"""The models: nothing is wrong with all protections, something is without any one of them, no boundary is left out."""

from __future__ import annotations

import random

import pytest

from eoframework.crashtest import points
from tests.campaign.exploration import Found, explore
from tests.campaign.model import MACHINES, machine_of
from tests.campaign.model_consume import END, Consume, World

REMOVALS = [(name, without) for name, machine in MACHINES.items() for without in machine.PROTECTIONS]
FAULTS = {
    "consume": {"crash", "assigned, the other pauses", "commit, the answer lost", "the COMMIT lost"},
    "relay": {"crash", "claim, the other pauses", "send EndTxn once more", "a row is refused, abort sent twice"},
    "transform": {"crash", "assigned, the other pauses", "send EndTxn once more", "the group's offsets expire"},
}


@pytest.fixture(scope="module", params=sorted(MACHINES))
def whole(request: pytest.FixtureRequest) -> Found:
    """All that a machine can do with every protection in place."""
    return explore(machine_of(request.param))


def test_with_every_protection_nothing_goes_wrong(whole: Found) -> None:
    """Two crashes, a pause, a request that arrives late, a lost answer, in every order; and never stuck."""
    assert whole.wrong == "", "\n".join(whole.lines())
    assert whole.states > 50_000
    assert whole.ended > 0, "the work is finished in some state"
    assert FAULTS[whole.machine] <= whole.fired.keys()


@pytest.mark.parametrize(("name", "without"), REMOVALS, ids=[f"{name}: {without}" for name, without in REMOVALS])
def test_without_a_protection_something_goes_wrong(name: str, without: str) -> None:
    """So the bad states are within reach, and the invariants see them. The trace is the shortest there is."""
    found = explore(machine_of(name, without), without=without)
    print(*found.lines(), sep="\n")
    assert found.wrong
    assert found.trace
    assert machine_of(name, without).wrong(found.trace[-1].state) or found.wrong.startswith("I10")


def test_every_boundary_of_the_flow_is_passed_or_left_out_for_a_reason(whole: Found) -> None:
    """Seen to fail with a row more in the flow's table, with a misspelt event in a step, and with a reason too many."""
    left_out = MACHINES[whole.machine].LEFT_OUT
    boundaries = {boundary.name for boundary in points.of(whole.machine)}
    assert whole.passed <= boundaries, "no boundary of this flow"
    assert boundaries - whole.passed == left_out.keys()
    assert all(left_out.values())


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_states_that_count_as_the_same_can_do_the_same(name: str) -> None:
    """What `same` forgets makes no difference: along random walks, forgetting before a step or after it is one.

    Seen to fail with a relay that keeps the rows it read, and with a checkpoint whose rows are forgotten.
    """
    machine, chance = machine_of(name), random.Random(name)
    for _ in range(60):
        state = machine.first()
        for _ in range(60):
            steps = list(machine.steps(state))
            kept = {machine.same(step.state) for step in steps}
            forgotten = {machine.same(step.state) for step in machine.steps(machine.same(state))}
            assert kept == forgotten, state
            assert machine.wrong(state) == machine.wrong(machine.same(state))
            if not steps:
                break
            state = chance.choice(steps).state


def test_a_state_from_which_the_work_cannot_be_finished_is_found() -> None:
    class Unending(Consume):
        def first(self) -> World:
            return World(crashes=0, moves=0)

        def done(self, s: World) -> bool:
            return s.position > END

    found = explore(Unending())
    assert found.wrong.startswith("I10")
    assert not found.trace, "from the beginning already"
