"""What must hold for every cell of the table of client errors, whatever the table says.

A table alone would call right whatever the code did on the day it was written. These rules come from what callers rely
on, and from which answers Kafka's protocol has retried (KIP-98, KIP-360, KIP-447).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from tests.campaign.client_error_cells import FAULTS, LATE, SESSION_MS, Cell, Seen
from tests.campaign.mock_cluster import Api

# The bounds of kafka/transaction.py, kafka/producer.py and kafka/bounded.py, in seconds, and room for a busy machine.
_ROOM = 5.0
_AT_ONCE = 8.0
_INIT, _FLUSH, _CALL, _ABORT, _GRACE = 15.0 + 1.0, 30.0, 15.0, 3.0, 2.0
_BOUNDS = {
    "make_ready": _INIT,
    "flush": _FLUSH,
    # All was flushed before, so that they have nothing else to wait for.
    "offsets": _CALL + _GRACE,
    "commit": _CALL + _GRACE,
    "abort": _ABORT + _GRACE,
    "give_up": _ABORT + _GRACE,
}
# A commit of a group's offsets waits until the client has found the coordinator again, which took it up to 112 s, at
# most session.timeout.ms. `GroupConsumer.close` waits 5 s for that and no longer.
_GROUP_BOUND = SESSION_MS / 1000

_GIVEN_WAY = frozenset({"Retryable", "Abortable", "Fenced", "RestartNeeded", "Rejected", "Rejected(topic)"})
_CLASSES = {
    "init": frozenset({"none", "Retryable", "Fenced", "ConfigurationError"}),
    "abort": frozenset({"none"}),
    "abort_unsent": frozenset({"none"}),
    "group_committed": frozenset({"none", "Retryable", "Permanent", "Fenced"}),
    "group_mark": frozenset({"none", "Retryable"}),
    "group_commit": frozenset({"none"}),
}
_SENDING = frozenset({"none"}) | _GIVEN_WAY
_FINAL = frozenset({"Fenced", "RestartNeeded", "ConfigurationError"})

_LOST = frozenset({"DROP", LATE})
_COORDINATOR = _LOST | {
    "COORDINATOR_LOAD_IN_PROGRESS",
    "COORDINATOR_NOT_AVAILABLE",
    "NOT_COORDINATOR",
    "CONCURRENT_TRANSACTIONS",
}
_FORBIDDEN = frozenset({"TRANSACTIONAL_ID_AUTHORIZATION_FAILED", "CLUSTER_AUTHORIZATION_FAILED"})
_FENCED = frozenset({"INVALID_PRODUCER_EPOCH", "PRODUCER_FENCED"})
_EVERY = frozenset(FAULTS)
# After which answers the client asks again by itself, so that our caller hears of nothing; others must be raised.
_ASKED_AGAIN = {
    Api.METADATA: _EVERY,
    Api.FIND_COORDINATOR: _EVERY - _FORBIDDEN,
    Api.INIT_PRODUCER_ID: _EVERY - _FORBIDDEN - _FENCED - {"INVALID_TRANSACTION_TIMEOUT"},
    Api.ADD_PARTITIONS_TO_TXN: _COORDINATOR | {"UNKNOWN_TOPIC_OR_PART"},
    Api.ADD_OFFSETS_TO_TXN: _COORDINATOR | {"UNKNOWN_TOPIC_OR_PART", "REQUEST_TIMED_OUT"},
    Api.TXN_OFFSET_COMMIT: _COORDINATOR | {"UNKNOWN_TOPIC_OR_PART", "REQUEST_TIMED_OUT"},
    Api.END_TXN: _COORDINATOR,
    Api.PRODUCE: _LOST
    | {
        "UNKNOWN_TOPIC_OR_PART",
        "LEADER_NOT_AVAILABLE",
        "NOT_LEADER_FOR_PARTITION",
        "REQUEST_TIMED_OUT",
        "BROKER_NOT_AVAILABLE",
        "COORDINATOR_LOAD_IN_PROGRESS",
        "COORDINATOR_NOT_AVAILABLE",
        "NOT_COORDINATOR",
        "NOT_ENOUGH_REPLICAS",
        "NOT_ENOUGH_REPLICAS_AFTER_APPEND",
        "KAFKA_STORAGE_ERROR",
        # Not asked again: it says that an earlier copy of this very batch has been written.
        "DUPLICATE_SEQUENCE_NUMBER",
    },
}


def broken_rules(cell: Cell, seen: Seen) -> list[str]:
    """Which rules this outcome breaks, each in a sentence; none is as it must be."""
    return [said for rule in _RULES for said in rule(cell, seen)]


def _something_was_injected(cell: Cell, seen: Seen) -> Iterator[str]:
    if seen.asked < 1:
        yield f"no {cell.call.api.name} request came: nothing was injected"


def _a_known_class(cell: Cell, seen: Seen) -> Iterator[str]:
    allowed = _CLASSES.get(cell.call.name, _SENDING)
    if seen.outcome not in allowed:
        yield f"raised {seen.outcome}, which its callers do not expect ({seen.why})"
    if seen.outcome == "Rejected" and cell.call.api is not Api.PRODUCE:
        yield "a record was blamed for an answer that was about none"


def _no_commit_without_an_answer(cell: Cell, seen: Seen) -> Iterator[str]:
    """What was reported as done got a good answer after the last bad one."""
    done = seen.committed if cell.call.name != "group_mark" else seen.outcome == "none"
    if not done or cell.call.name == "group_commit":
        return
    if _is_transactional(cell) and seen.endings < 1:
        yield "reported as committed without any EndTxn"
    written_before = cell.call.api is Api.PRODUCE and cell.fault == "DUPLICATE_SEQUENCE_NUMBER"
    # A late answer is a good one.
    wanted = 1 if cell.fault == LATE or written_before else cell.times + 1
    if seen.asked < wanted:
        yield f"reported as done after {seen.asked} {cell.call.api.name}, of which {cell.times} were answered badly"


def _a_doubt_replaces_the_client(cell: Cell, seen: Seen) -> Iterator[str]:
    if cell.call.name.startswith("group_"):
        return
    doubtful = seen.outcome != "none" or cell.call.at == "abort" or "abort" in cell.call.steps
    if _is_transactional(cell):
        doubtful = doubtful or seen.endings > 1
    if doubtful and not seen.replaced:
        yield "the next transaction was made by the client in doubt"
    # Not every caller aborts what it failed to commit: a `Producer` makes itself ready, and reads what became of it.
    if cell.call.api is Api.END_TXN and seen.outcome != "none" and not seen.doubted:
        yield "a commit that failed did not put its client in doubt"


def _it_ends_in_time(cell: Cell, seen: Seen) -> Iterator[str]:
    bounds: Mapping[str, float] = _BOUNDS
    if cell.call.name == "idempotent":
        bounds = {"commit": _FLUSH}
    elif cell.call.name.startswith("group_"):
        bounds = dict.fromkeys(seen.seconds, _GROUP_BOUND)
    for step, taken in seen.seconds.items():
        bound = bounds.get(step.removeprefix("next "))
        if bound is not None and taken > bound + _ROOM:
            yield f"{step} took {taken:.1f} s, {bound:g} s are allowed"


def _no_final_answer_is_asked_for_twice(cell: Cell, seen: Seen) -> Iterator[str]:
    if seen.outcome in _FINAL and seen.asked != 1:
        yield f"{seen.outcome}, and yet {cell.call.api.name} was asked {seen.asked} times of the same client"
    if seen.outcome in _FINAL and not cell.call.name.startswith("group_") and seen.seconds[seen.at] > _AT_ONCE:
        yield f"{seen.outcome}, which was tried again for {seen.seconds[seen.at]:.1f} s"


def _afterwards_all_is_well(cell: Cell, seen: Seen) -> Iterator[str]:
    # The mock says that an earlier copy was written, and has none; so it misses a sequence number from then on.
    lied = cell.call.api is Api.PRODUCE and cell.fault == "DUPLICATE_SEQUENCE_NUMBER" and seen.next == "RestartNeeded"
    if seen.next != "ok" and not lied:
        yield f"the next transaction failed: {seen.next} at {seen.at} ({seen.why})"


def _an_answer_is_retried_or_raised(cell: Cell, seen: Seen) -> Iterator[str]:
    if cell.call.name.startswith(("group_", "abort")):
        return
    if cell.call.name == "offsets" and cell.call.api is Api.FIND_COORDINATOR:
        # Some the client asks again, of some it forgets to tell whoever waits (kafka/bounded.py), depending on how many
        # there are. That `none` stands only after a good answer is a rule of its own.
        return
    again = _ASKED_AGAIN[cell.call.api]
    if cell.call.name == "idempotent" and cell.call.api is Api.PRODUCE:
        again = again | {"UNKNOWN_PRODUCER_ID"}  # KIP-360: a new epoch, and again; outside transactions only
    if seen.outcome == "none" and cell.fault not in again:
        yield "an answer that the protocol does not retry was swallowed"
    if seen.outcome != "none" and cell.fault in again:
        yield f"raised as {seen.outcome}, although asking again is all it takes"


def _the_fenced_hear_it(cell: Cell, seen: Seen) -> Iterator[str]:
    if not _is_transactional(cell) or cell.call.api in {Api.METADATA, Api.FIND_COORDINATOR}:
        return
    if cell.fault not in _FENCED:
        return
    if cell.call.steps[-1] == "abort" and not seen.found_fenced:
        yield "an abort did not note that another producer had taken over"
    if cell.call.steps[-1] != "abort" and seen.outcome != "Fenced":
        yield f"another producer has taken over, and what was raised is {seen.outcome}"


def _a_right_that_is_missing_is_named(cell: Cell, seen: Seen) -> Iterator[str]:
    if cell.call.name == "init" and cell.fault in _FORBIDDEN and seen.outcome != "ConfigurationError":
        yield f"a missing right is told as {seen.outcome}"


def _is_transactional(cell: Cell) -> bool:
    return cell.call.name not in {"idempotent", "group_committed", "group_mark", "group_commit"}


_RULES: tuple[Callable[[Cell, Seen], Iterator[str]], ...] = (
    _something_was_injected,
    _a_known_class,
    _no_commit_without_an_answer,
    _a_doubt_replaces_the_client,
    _it_ends_in_time,
    _no_final_answer_is_asked_for_twice,
    _afterwards_all_is_well,
    _an_answer_is_retried_or_raised,
    _the_fenced_hear_it,
    _a_right_that_is_missing_is_named,
)
RULES = len(_RULES)
