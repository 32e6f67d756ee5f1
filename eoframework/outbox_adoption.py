"""`eo outbox adopt`: the outbox goes on where Kafka says it is, after a restore or on another cluster.

What the checkpoints say and what the database says contradict each other, so neither tells what was sent. The topics
do: each message bears its id. Those of the pending messages that are there are deleted, the others are sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Literal

from eoframework.checkpoint import Checkpoint, digest_of
from eoframework.db.audit import whoever
from eoframework.db.outbox_adoption import Change, OutboxAdoption, Waiting
from eoframework.db.session import Database
from eoframework.db.shards import ShardState
from eoframework.errors import FailClosed
from eoframework.kafka.admin import Admin
from eoframework.kafka.checkpoint import CheckpointLog, CheckpointPlace
from eoframework.kafka.sent_ids import find_sent
from eoframework.settings import Settings

Unknown = Literal["send", "discard"]


@dataclass(frozen=True, slots=True)
class Adopted:
    """What was found and done."""

    cluster_id: str
    batches: Mapping[int, tuple[int, int]]
    """The shards that were set: their last batch, before and after."""
    sent: Sequence[Waiting] = ()
    """Were in their topics, and are no longer in the outbox."""
    discarded: Sequence[Waiting] = ()
    left: int = 0
    """Are sent as soon as a relay runs."""
    dead_sent: Sequence[Waiting] = ()
    """Dead letters whose messages are in their topics: put back meanwhile, in a time that the database forgot."""


def adopt(
    database: Database, settings: Settings, *, admin: Admin, unknown: Unknown | None = None, actor: str | None = None
) -> Adopted:
    """Set every shard that contradicts Kafka to its last checkpoint there, and delete what was sent from the outbox.

    On a crash: done with its audit row, or not at all; say it again. unknown: what to do about messages whose topic no
    longer tells. Raises FailClosed for those without it, while a relay runs or a Kafka transaction is open, and for
    checkpoints that are not this outbox's; UnknownTopic without a checkpoint topic.
    """
    desk = OutboxAdoption(database, settings)
    desk.refuse()
    outbox_id, count = desk.shards.outbox()
    log = CheckpointLog(settings, admin, outbox_id)
    place, before = log.place(shards=count), desk.shards.states()
    lasts = {shard: _own(log, place, shard) for shard in sorted(before)}
    rows = desk.waiting(before)
    after = {
        shard: ShardState(last.batch_no if last else 0, place.cluster_id, place.topic_id)
        for shard, last in lasts.items()
        if not _agree(before[shard], last, place, [row for row in rows if row.shard == shard])
    }
    if not after:
        return Adopted(place.cluster_id, {})
    sent, doubtful = _look(settings, admin, [row for row in rows if row.shard is None or row.shard in after])
    gone = [row for row in sent if row.state != "dead"]
    if doubtful and unknown is None:
        raise _nobody_knows(doubtful)
    discarded = [row for row, _ in doubtful] if unknown == "discard" else []
    change = Change({shard: before[shard] for shard in after}, after, gone, discarded)
    desk.apply(outbox_id, change, actor=whoever(actor))
    left = sum(row.shard is not None for row in rows) - len(gone) - len(discarded)
    batches = {shard: (before[shard].batch_no, state.batch_no) for shard, state in after.items()}
    return Adopted(place.cluster_id, batches, gone, discarded, left, [row for row in sent if row.state == "dead"])


def _own(log: CheckpointLog, place: CheckpointPlace, shard: int) -> Checkpoint | None:
    last = log.last(shard)
    ours = (log.outbox_id, shard, place.cluster_id, place.topic_id)
    if last is not None and (last.outbox_id, last.shard, last.cluster_id, last.topic_id) != ours:
        raise FailClosed(
            f"the last checkpoint in {log.topic}[{shard}] was copied there, and says nothing of this cluster. Nothing "
            "was changed.",
            remedy=f"Delete {log.topic} on this cluster, make it anew (eo topics apply MODULE:APP), and: eo outbox "
            "adopt",
        )
    return last


def _agree(state: ShardState, last: Checkpoint | None, place: CheckpointPlace, rows: Sequence[Waiting]) -> bool:
    """Whether a relay would go on there by itself."""
    if last is None:
        bound = (state.cluster_id, state.topic_id)
        return state.batch_no == 0 and bound in ((None, None), (place.cluster_id, place.topic_id))
    if (state.cluster_id, state.topic_id) != (place.cluster_id, place.topic_id):
        return False
    named = sorted((row.number, row.id) for row in rows if row.state == "pending" and row.number in set(last.seqs))
    unfinished = last.batch_no == state.batch_no + 1 and digest_of(named) == last.digest
    return last.batch_no == state.batch_no or unfinished


def _look(settings: Settings, admin: Admin, rows: Sequence[Waiting]) -> tuple[list[Waiting], list[tuple[Waiting, str]]]:
    """Those that were sent, and those of which nobody can tell, with the reason."""
    sent, doubtful = [], []
    for topic, group in groupby(sorted(rows, key=attrgetter("topic")), key=attrgetter("topic")):
        there = list(group)
        search = find_sent(
            settings, admin, topic, {row.id for row in there}, since=min(row.created_at for row in there)
        )
        sent += [row for row in there if row.id in search.found]
        if search.doubt:
            doubtful += [(row, search.doubt) for row in there if row.id not in search.found and row.state != "dead"]
    return sent, doubtful


def _nobody_knows(doubtful: Sequence[tuple[Waiting, str]]) -> FailClosed:
    topics = {row.topic: why for row, why in doubtful}
    told = "; ".join(f"{topic} ({why})" for topic, why in sorted(topics.items()))
    return FailClosed(
        f"whether {len(doubtful)} pending messages were sent is not to be told from their topics: {told}. Nothing was "
        "changed.",
        remedy="To send them, those sent before a second time with the same ids: eo outbox adopt --unknown send. Not "
        "to send them: eo outbox adopt --unknown discard",
    )
