"""The boundaries of what reads from Kafka into the database: (name, durable before, durable after, leads to)."""

from __future__ import annotations

Row = tuple[str, str, str, str]

CONSUME: tuple[Row, ...] = (
    (
        "consume.registered",
        "the consumer, and where it begins in every partition",
        "–",
        "it begins there; `start=` is not asked again",
    ),
    ("consume.claiming", "nothing of the claim", "the epoch of the first partition", "the successor claims"),
    (
        "consume.holder_terminated",
        "the frozen owner's transaction is rolled back",
        "the new epoch",
        "the successor claims",
    ),
    (
        "kafka.offset_marked",
        "the new epoch; our mark on a group's offset that another program committed",
        "–",
        "the successor claims again, and knows the offset as ours",
    ),
    ("consume.claimed", "the new epoch: nobody before can commit", "–", "the successor claims again"),
    ("kafka.polled", "nothing of the batch", "–", "the batch is fetched again"),
    (
        "consume.handled",
        "nothing of the batch",
        "effects, processed ids, outbox rows, position",
        "rolled back, fetched again",
    ),
    (
        "db.committing",
        "nothing of the batch",
        "effects, processed ids, outbox rows, position",
        "all of it or nothing: the position row says which",
    ),
    (
        "db.committed",
        "effects, processed ids, outbox rows, position",
        "the group's offset",
        "nothing runs again; lag tools lag",
    ),
    ("kafka.offsets_committed", "the group's offset", "–", "–"),
    ("consume.fenced", "nothing of the batch; another owner's epoch", "–", "as after `kafka.polled`"),
    ("kafka.loss_guarded", "nothing of what the client skipped", "–", "as after `kafka.polled`"),
    (
        "consume.failed",
        "what precedes the message in its partition (`retry=None`)",
        "–",
        "it is fetched again, and fails again",
    ),
    (
        "consume.revoked",
        "every batch before: no transaction is open here",
        "our name out of the rows",
        "the new owner claims, and takes us for dead",
    ),
    ("consume.released", "our name is out of the rows", "the group's offset", "the next owner claims"),
)

FAILURE: tuple[Row, ...] = (
    (
        "consume.charged",
        "one more crash of the message that is about to run",
        "–",
        "it stays counted, if the process really died",
    ),
    (
        "consume.due",
        "nothing of this attempt at a parked message",
        "effects, id, outbox rows; its row gone",
        "the lane is due again",
    ),
    (
        "consume.settled",
        "nothing of the batch, nor of what it sets aside",
        "parked messages, dead letters, their ids; the position",
        "rolled back, fetched again, or due again",
    ),
    (
        "db.committing",
        "nothing of the attempt, or of the count",
        "all of it",
        "the position row, or the parked one, says which",
    ),
    ("db.committed", "the parked row or its deletion, the count, the dead letter", "–", "nothing of it runs again"),
    ("consume.failed", "the message waits in its lane, or in its place, its attempt counted", "–", "it runs when due"),
    ("consume.unparked", "effects, id and outbox rows of a parked message; its row gone", "–", "–"),
    ("consume.dead_lettered", "the dead letter, its id; the position, or the parked row gone", "–", "–"),
)

EXTERNAL: tuple[Row, ...] = (
    (
        "external.claimed",
        "the claim",
        "the call outside",
        "nobody knows whether it was called: after the lease, `unresolved` decides",
    ),
    ("external.called", "the claim; the call was made", "the result", "the same"),
    ("external.stored", "the result", "–", "the stored result is used, no second call"),
    (
        "external.ended",
        "how it ended: free again (`NotDone`), or unresolved",
        "the message's failure",
        "the message runs again; a free call is made, of another `unresolved` decides",
    ),
)

REPROCESS: tuple[Row, ...] = (
    ("reprocess.noted", "the audit row of its beginning, or end", "–", "said again: what was done is a duplicate"),
    ("reprocess.handled", "nothing of the batch", "effects, ids, outbox rows", "rolled back; the next run does it"),
    ("db.committing", "nothing of the batch", "effects, ids, outbox rows", "the ids say which"),
    ("db.committed", "effects, ids, outbox rows of the batch", "–", "the next run finds duplicates"),
    ("reprocess.committed", "effects, ids, outbox rows of the batch", "–", "the next run finds duplicates"),
)
