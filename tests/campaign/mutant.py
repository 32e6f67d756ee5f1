"""What a planted bug is, and which tests look for it."""

from __future__ import annotations

from dataclasses import dataclass

LAYERS: dict[str, tuple[str, ...]] = {
    "statements": (
        "tests/consume/test_same_id_at_once.py",
        "tests/consume/test_one_message.py",
        "tests/consume/test_outcomes.py",
        "tests/consume/test_ownership.py",
        "tests/publish/test_order.py",
    ),
    "guards": ("tests/consume/test_guards.py",),
    "fetching": ("tests/consume/test_loss_guard.py",),
    "late answers": ("tests/consume/test_late_offsets.py",),
    "crash points, forked": (
        "tests/campaign/test_forked.py::test_a_crash_at_any_boundary_and_one_in_its_recovery_change_nothing",
    ),
    "stateful": ("tests/failure/test_parking_model.py",),
    "failures": ("tests/failure/test_parking.py", "tests/failure/test_dead_letters.py"),
    "operators": ("tests/failure/test_dead_replay.py",),
    "coverage": ("tests/failure/test_reprocess_coverage.py",),
    "external": ("tests/failure/test_external_step.py", "tests/failure/test_external_crashes.py"),
    "cuts of COMMIT": ("tests/consume/test_commit_cut.py",),
    "kills, consume": ("tests/consume/test_crashes.py", "tests/failure/test_crash_boundaries.py"),
    "freezes, consume": ("tests/consume/test_zombies.py",),
    "fail closed, consume": ("tests/consume/test_fail_closed.py",),
    "kills and freezes, relay": ("tests/relay/test_crashes.py",),
    "relay": ("tests/relay/test_flow.py", "tests/relay/test_broken_services.py"),
    "late EndTxn, relay": ("tests/relay/test_bounded.py", "tests/relay/test_broken_services.py"),
    "late requests, transform": ("tests/transform/test_late_requests.py",),
    "kills, transform": ("tests/transform/test_crashes.py",),
    "freezes, transform": ("tests/transform/test_zombies.py",),
    "doubts, transform": ("tests/transform/test_doubts.py", "tests/transform/test_failing.py"),
    "beginning, transform": ("tests/transform/test_beginning.py",),
    "publishing": ("tests/publish/test_connection.py",),
    "fail closed, relay": ("tests/relay/test_fail_closed.py",),
    "restored": ("tests/restored/test_copies.py", "tests/restored/test_set_back.py"),
    "pooler": ("tests/postgres/test_pgbouncer.py",),
}
"""What looks for them, by name: cheap layers first, where a mutant names several."""


Change = tuple[str, str, str]
"""A file, what stands there once, and what is put into its place."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A protection taken out."""

    name: str
    what: str
    """What goes wrong without it."""
    layers: tuple[str, ...]
    changes: tuple[Change, ...]
    """What stands behind it and would make good for it is taken out too."""

    @property
    def paths(self) -> set[str]:
        return {path for path, _, _ in self.changes}


def bug(
    name: str, what: str, path: str, before: str, after: str, *layers: str, also: tuple[Change, ...] = ()
) -> Mutant:
    """A bug in a file of our package; `before` stands there once. layers: who looks for it, the cheap ones first."""
    unknown = set(layers) - LAYERS.keys()
    assert not unknown, unknown
    return Mutant(name, what, layers, ((f"eoframework/{path}", before, after), *also))


OWN = "with connection.engine.begin() as own:"
"""Another transaction, where it should be the same."""
