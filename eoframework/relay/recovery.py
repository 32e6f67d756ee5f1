"""What a shard's database row and its checkpoint in Kafka say together, and what follows."""

from __future__ import annotations

import logging

from eoframework import events
from eoframework.checkpoint import Checkpoint
from eoframework.db.pending import PendingRows, RowsDiffer
from eoframework.db.shards import Claim, Shards, ShardState
from eoframework.errors import FailClosed
from eoframework.kafka.answers import UnknownTopic
from eoframework.kafka.checkpoint import CheckpointLog, CheckpointPlace

_log = logging.getLogger(__name__)

_START_ANEW = "To go on here, after eo topics apply MODULE:APP where it is missing: eo outbox adopt"


def settle(
    claim: Claim, shards: Shards, rows: PendingRows, checkpoints: CheckpointLog, *, shard_count: int
) -> tuple[CheckpointPlace, int]:
    """Delete the rows of a batch that was published but not deleted, if there is one; returns the batch number.

    Only right after `init_transactions()` of the shard's transactional.id: nothing of an earlier owner is open then.
    Raises FailClosed when the two contradict each other: each such case means that a database or a topic is not the
    one it was, and either guess would lose or double messages.

        checkpoint            meaning
        none, batch_no = 0    the first use
        batch_no              nothing is in doubt
        batch_no + 1          published, not deleted: the same rows are deleted now
        anything else         fail closed
    """
    place = find_place(checkpoints, {claim.shard: shards.check(claim)}, shard_count=shard_count)
    last = checkpoints.last(claim.shard)
    # After the checkpoint, not before: a relay frozen in between would compare its successor's checkpoint with its own
    # old state, and call that a contradiction.
    state = shards.check(claim)
    if last is None:
        _first_use(claim, shards, state, place, checkpoints)
        return place, state.batch_no
    _belongs(last, claim.shard, checkpoints, place)
    if state.cluster_id is None or last.batch_no not in (state.batch_no, state.batch_no + 1):
        raise _contradiction(f"{claim}: Kafka's last batch is {last.batch_no}, the database's is {state.batch_no}.")
    if last.batch_no == state.batch_no + 1:
        _finish(claim, rows, last)
    return place, last.batch_no


def find_place(checkpoints: CheckpointLog, states: dict[int, ShardState], *, shard_count: int) -> CheckpointPlace:
    """The checkpoint topic, verified, and compared with the one these shards have used so far."""
    # First: on another cluster the topic may be missing too, which is no loss there.
    cluster_id = checkpoints.cluster_id()
    for shard, state in states.items():
        if state.cluster_id is not None and state.cluster_id != cluster_id:
            raise FailClosed(
                f"shard {shard} of this outbox was relayed to Kafka cluster {state.cluster_id}, this one is "
                f"{cluster_id}.",
                remedy=f"Correct EO_KAFKA_BOOTSTRAP_SERVERS or EO_DATABASE_URL. {_START_ANEW}",
            )
    try:
        place = checkpoints.place(shards=shard_count)
    except UnknownTopic as error:
        if any(state.batch_no for state in states.values()):
            raise FailClosed(
                f"checkpoint topic {checkpoints.topic} is gone, and with it what was published last.",
                remedy=_START_ANEW,
            ) from error
        raise
    for state in states.values():
        if state.topic_id is not None and state.topic_id != place.topic_id:
            raise FailClosed(
                f"checkpoint topic {checkpoints.topic} was deleted and made again, so what was published last is lost.",
                remedy=_START_ANEW,
            )
    return place


def refuse_set_back(checkpoints: CheckpointLog, place: CheckpointPlace, shards: Shards, rows: PendingRows) -> None:
    """Stop before any shard is relayed if one of them published what the database does not know of.

    What `settle` finds too, but shard by shard, while the others send; and not at all where nothing is to be sent.
    Other relays may be at work: what the database knows is read after the checkpoints, in one statement a shard, so
    that a batch of theirs never looks like one that it has lost.
    """
    lasts = {shard: checkpoints.last(shard) for shard in sorted(shards.states())}
    behind = []
    for shard, last in lasts.items():
        if last is not None:
            _belongs(last, shard, checkpoints, place)
            lost = rows.lost(last)
            behind += [f"shard {shard}: {lost}"] if lost else []
    if behind:
        raise _contradiction(f"{'; '.join(behind)}.")


def _first_use(
    claim: Claim, shards: Shards, state: ShardState, place: CheckpointPlace, checkpoints: CheckpointLog
) -> None:
    if state.batch_no != 0:
        raise FailClosed(
            f"{claim}: the database knows {state.batch_no} batches, the checkpoint topic none: it lost its records.",
            remedy=_START_ANEW,
        )
    if state.cluster_id is None:
        shards.bind(claim, cluster_id=place.cluster_id, topic_id=place.topic_id)
        events.emit("relay.bound", shard=claim.shard, cluster_id=place.cluster_id)


def _belongs(last: Checkpoint, shard: int, checkpoints: CheckpointLog, place: CheckpointPlace) -> None:
    found = (last.outbox_id, last.shard, last.cluster_id, last.topic_id)
    if found != (checkpoints.outbox_id, shard, place.cluster_id, place.topic_id):
        raise FailClosed(
            f"the last checkpoint in {checkpoints.topic}[{shard}] is not this shard's: it was copied there.",
            remedy=f"Checkpoint topics must not be mirrored or restored: delete {checkpoints.topic}. {_START_ANEW}",
        )


def _finish(claim: Claim, rows: PendingRows, last: Checkpoint) -> None:
    try:
        rows.remove_published(claim, last)
    except RowsDiffer as error:
        raise _contradiction(f"{claim}: {error.what}") from error
    _log.info(
        "relay %s: batch %d (%d rows) was in Kafka but not yet deleted; deleted now, nothing is sent twice.",
        claim,
        last.batch_no,
        len(last.seqs),
    )
    events.emit("relay.recovered", shard=claim.shard, batch_no=last.batch_no, rows=len(last.seqs))


def _contradiction(what: str) -> FailClosed:
    return FailClosed(
        f"{what} The database was restored, promoted or copied.",
        remedy="If it takes the place of the one that sent those batches, which nobody uses any more: eo outbox adopt. "
        "If it is a copy of one that lives on: eo db adopt copy",
    )
