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
    "failures, consume": ("tests/consume/test_failures.py",),
    "first starts": (
        "tests/consume/test_failures.py::test_a_renamed_handler_refuses_to_start",
        "tests/consume/test_failures.py::"
        "test_a_partition_that_appears_later_is_read_from_its_beginning_even_with_start_latest",
    ),
    "stale objects": ("tests/failure/test_stale_objects.py",),
    "lists": ("tests/failure/test_batch_items.py",),
    "leaving": ("tests/failure/test_leaving.py",),
    "breaker": ("tests/failure/test_breaker.py",),
    "operators": ("tests/failure/test_dead_replay.py",),
    "dead letter desk": ("tests/failure/test_dead_lists.py", "tests/failure/test_stranded.py"),
    "coverage": ("tests/failure/test_reprocess_coverage.py",),
    "reprocess": ("tests/failure/test_reprocess_effects.py",),
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
    "gone, transform": ("tests/transform/test_gone.py",),
    "deadly, transform": ("tests/transform/test_deadly.py::test_what_waits_behind_a_failing_message_is_not_counted",),
    "publishing": ("tests/publish/test_connection.py",),
    "sessions": ("tests/publish/test_session.py",),
    "durability": ("tests/publish/test_durability.py",),
    "fail closed, relay": ("tests/relay/test_fail_closed.py",),
    "held keys": ("tests/relay/test_hold.py",),
    "unsendable": ("tests/relay/test_unsendable.py::test_one_large_row_among_small_ones",),
    "delayed": (
        "tests/relay/test_flow.py::test_delayed_message_comes_when_due_and_not_before",
        "tests/relay/test_flow.py::test_delayed_messages_come_in_the_order_of_their_times",
    ),
    "modes, relay": ("tests/relay/test_flow.py::test_idempotent_mode_first_settles_what_transactions_left",),
    "standby, relay": (
        "tests/relay/test_broken_services.py::test_rows_wait_for_the_standby_before_they_are_published",
    ),
    "restored": ("tests/restored/test_copies.py", "tests/restored/test_set_back.py"),
    "pooler": ("tests/postgres/test_pgbouncer.py",),
    "sessions of a pooler": ("tests/postgres/test_pgbouncer.py::test_what_others_left_in_a_session_is_not_ours",),
    "cancelled COMMITs": (
        "tests/postgres/test_standby.py::test_a_commit_whose_wait_for_the_standby_was_cancelled_is_in_doubt",
        "tests/postgres/test_standby.py::test_the_relay_sends_nothing_that_the_standby_may_not_have",
    ),
    "promotions": ("tests/postgres/test_standby.py::test_what_an_asynchronous_standby_lacked_is_told_and_resolved",),
    "transactions, producer": (
        "tests/producer/test_transactions.py::test_an_exception_in_the_block",
        "tests/producer/test_transactions.py::test_a_delivery_error_swallowed_in_the_block",
    ),
    "outages, producer": ("tests/producer/test_outages.py::test_a_commit_without_an_answer_that_happened",),
    "lost clients": ("tests/consume/test_lost_cluster.py",),
    "lost clients, producer": (
        "tests/producer/test_giving_up.py::test_a_client_that_finds_no_broker_any_more_is_replaced",
        "tests/producer/test_giving_up.py::test_a_client_that_was_confirmed_something_is_only_slow",
    ),
    "client errors": ("tests/campaign/test_client_errors.py",),
    "brokers": ("tests/cluster/test_brokers.py::test_each_killed_in_turn_under_load",),
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
