"""What a shard's database row and its checkpoint in Kafka say together, and what follows."""

from __future__ import annotations

import logging

from eoframework import events
from eoframework.checkpoint import Checkpoint
from eoframework.db.pending import PendingRows, RowsDiffer
from eoframework.db.shards import Claim, Shards, ShardState
from eoframework.errors import FailClosed
from eoframework.kafka.admin import UnknownTopic
from eoframework.kafka.checkpoint import CheckpointLog, CheckpointPlace

_log = logging.getLogger(__name__)


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
    _belongs(last, claim, checkpoints, place)
    if state.cluster_id is None or last.batch_no not in (state.batch_no, state.batch_no + 1):
        raise _contradiction(
            checkpoints, f"{claim}: Kafka's last batch is {last.batch_no}, the database's is {state.batch_no}.", last
        )
    if last.batch_no == state.batch_no + 1:
        _finish(claim, rows, last, checkpoints)
    return place, last.batch_no


def find_place(checkpoints: CheckpointLog, states: dict[int, ShardState], *, shard_count: int) -> CheckpointPlace:
    """The checkpoint topic, verified, and compared with the one these shards have used so far."""
    try:
        place = checkpoints.place(shards=shard_count)
    except UnknownTopic as error:
        if any(state.batch_no for state in states.values()):
            raise FailClosed(
                f"checkpoint topic {checkpoints.topic} is gone, and with it what was published last.",
                remedy=_start_anew(checkpoints),
            ) from error
        raise
    for shard, state in states.items():
        if state.cluster_id is not None and state.cluster_id != place.cluster_id:
            raise FailClosed(
                f"shard {shard} of this outbox was relayed to Kafka cluster {state.cluster_id}, this one is "
                f"{place.cluster_id}.",
                remedy=f"Correct EO_KAFKA_BOOTSTRAP_SERVERS or EO_DATABASE_URL. {_start_anew(checkpoints)}",
            )
        if state.topic_id is not None and state.topic_id != place.topic_id:
            raise FailClosed(
                f"checkpoint topic {checkpoints.topic} was deleted and made again, so what was published last is lost.",
                remedy=_start_anew(checkpoints),
            )
    return place


def _first_use(
    claim: Claim, shards: Shards, state: ShardState, place: CheckpointPlace, checkpoints: CheckpointLog
) -> None:
    if state.batch_no != 0:
        raise FailClosed(
            f"{claim}: the database knows {state.batch_no} batches, the checkpoint topic none: it lost its records.",
            remedy=_start_anew(checkpoints),
        )
    if state.cluster_id is None:
        shards.bind(claim, cluster_id=place.cluster_id, topic_id=place.topic_id)
        events.emit("relay.bound", shard=claim.shard, cluster_id=place.cluster_id)


def _belongs(last: Checkpoint, claim: Claim, checkpoints: CheckpointLog, place: CheckpointPlace) -> None:
    found = (last.outbox_id, last.shard, last.cluster_id, last.topic_id)
    if found != (checkpoints.outbox_id, claim.shard, place.cluster_id, place.topic_id):
        raise FailClosed(
            f"the last checkpoint in {checkpoints.topic}[{claim.shard}] is not this shard's: it was copied there.",
            remedy="Checkpoint topics must not be mirrored or restored. " + _start_anew(checkpoints),
        )


def _finish(claim: Claim, rows: PendingRows, last: Checkpoint, checkpoints: CheckpointLog) -> None:
    try:
        rows.remove_published(claim, last)
    except RowsDiffer as error:
        raise _contradiction(checkpoints, f"{claim}: {error.what}", last) from error
    _log.info(
        "relay %s: batch %d (%d rows) was in Kafka but not yet deleted; deleted now, nothing is sent twice.",
        claim,
        last.batch_no,
        len(last.seqs),
    )
    events.emit("relay.recovered", shard=claim.shard, batch_no=last.batch_no, rows=len(last.seqs))


def _contradiction(checkpoints: CheckpointLog, what: str, last: Checkpoint) -> FailClosed:
    return FailClosed(
        f"{what} The database was restored, promoted or copied.",
        remedy=(
            "If this database is to go on: its outbox rows will be sent, those sent before a second time (same message "
            f"ids): UPDATE {checkpoints.shard_table} SET batch_no = {last.batch_no}, cluster_id = '{last.cluster_id}', "
            f"checkpoint_topic_id = '{last.topic_id}' WHERE shard = {last.shard}; then start the relay."
        ),
    )


def _start_anew(checkpoints: CheckpointLog) -> str:
    return (
        "To start anew, at the price that the last batch of each shard may be sent twice (same message ids): make the "
        f"topic (eo topics apply), then UPDATE {checkpoints.shard_table} SET batch_no = 0, cluster_id = NULL, "
        "checkpoint_topic_id = NULL."
    )
