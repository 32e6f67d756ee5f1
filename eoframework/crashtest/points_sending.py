"""The boundaries of what writes to Kafka: (name, durable before, durable after, leads to)."""

from __future__ import annotations

Row = tuple[str, str, str, str]

RELAY: tuple[Row, ...] = (
    ("relay.claimed", "the shard's new epoch", "–", "the next owner takes over after the lease"),
    (
        "kafka.producer.opening",
        "nothing; the epoch was checked just before",
        "earlier producers fenced, their open transaction ended",
        "the next owner's producer does the same",
    ),
    (
        "kafka.producer.ready",
        "earlier producers fenced, their open transaction ended",
        "–",
        "the next owner reads the checkpoint",
    ),
    ("relay.bound", "which cluster and checkpoint topic the shard's batches go to", "–", "the next owner finds it so"),
    (
        "relay.recovered",
        "the rows of a published batch deleted, the batch counted",
        "–",
        "database and checkpoint agree",
    ),
    ("relay.made_due", "delayed rows stand in the outbox", "–", "they are selected like any other"),
    ("relay.selected", "nothing", "–", "the rows are selected again"),
    (
        "relay.produced",
        "records and checkpoint in an open transaction, invisible",
        "–",
        "Kafka aborts them, the rows are sent again",
    ),
    ("kafka.transaction.flushed", "the same, in the log", "–", "Kafka aborts them, the rows are sent again"),
    (
        "kafka.transaction.committing",
        "the same",
        "records and checkpoint visible",
        "sent again, or deleted unsent: the checkpoint says which",
    ),
    (
        "kafka.transaction.committed",
        "records and checkpoint",
        "–",
        "the next owner deletes the rows, sends nothing",
    ),
    (
        "relay.committed",
        "records and checkpoint",
        "the rows gone, the batch counted",
        "the next owner deletes the rows, sends nothing",
    ),
    ("relay.deleted", "the rows gone, the batch counted", "–", "–"),
    ("kafka.transaction.aborted", "nothing of the transaction", "–", "the rows are sent again, fewer at a time"),
    ("kafka.producer.replaced", "whatever the doubtful transaction left", "–", "the next producer settles"),
    (
        "relay.refused",
        "nothing of the burial; the checkpoint says that the row was not sent",
        "dead letter, held key; the row gone",
        "the row is tried, refused and buried by the next owner",
    ),
    ("relay.dead_lettered", "the dead letter, and with `hold` the held key; the row gone", "–", "–"),
    ("relay.topic_paused", "–", "–", "the next owner finds out again"),
    ("relay.released", "the shard is free", "–", "the next owner takes it at once"),
)

TRANSFORM: tuple[Row, ...] = (
    (
        "transform.registered",
        "the transform, and where it begins in every partition",
        "–",
        "it begins there; `start=` is not asked again",
    ),
    (
        "kafka.producer.opening",
        "nothing",
        "the predecessor of this name fenced, its transaction ended",
        "the successor's producer does the same",
    ),
    (
        "kafka.producer.ready",
        "the predecessor of this name fenced, its transaction ended",
        "–",
        "the successor reads the group's offsets",
    ),
    (
        "transform.planned",
        "where partitions begin in which the group has no offset",
        "–",
        "the successor begins there",
    ),
    (
        "transform.claimed",
        "nothing; the producer is new, or was without doubt",
        "–",
        "the successor reads the same offsets",
    ),
    ("transform.begun", "that the group has offsets there: missing ones are lost from now on", "–", "–"),
    ("kafka.polled", "nothing of the batch", "–", "it is fetched again"),
    ("transform.handled", "nothing of the batch", "–", "it is fetched again"),
    (
        "transform.produced",
        "outputs in an open transaction, invisible",
        "–",
        "Kafka aborts them, the batch runs again",
    ),
    ("kafka.transaction.flushed", "the same, in the log", "–", "aborted, the batch runs again"),
    (
        "kafka.transaction.offsets_sent",
        "the group's new offsets too, in the open transaction",
        "–",
        "aborted with it",
    ),
    (
        "kafka.transaction.committing",
        "the same",
        "outputs, dead letters, the group's offsets with their marks",
        "all of it or nothing: the group's offsets say which",
    ),
    (
        "kafka.transaction.committed",
        "outputs, dead letters, the group's offsets with their marks",
        "–",
        "the successor goes on behind it",
    ),
    ("transform.committed", "outputs, dead letters, the group's offsets with their marks", "–", "–"),
    (
        "transform.held",
        "one more attempt at the message; what precedes it",
        "–",
        "it waits again, from the moment of the restart",
    ),
    ("transform.dead_lettered", "the dead letter, and the offset past it", "–", "–"),
    ("kafka.transaction.aborted", "nothing of the batch", "–", "the batch runs again, in smaller parts"),
    ("transform.given_way", "nothing of the batch, or all", "–", "the group's offsets say which"),
    ("kafka.producer.replaced", "whatever the doubtful transaction left", "–", "the next producer settles"),
)

PRODUCER: tuple[Row, ...] = (
    ("kafka.producer.opening", "nothing", "an earlier Producer of this name fenced", "the next one does the same"),
    ("kafka.producer.ready", "an earlier Producer of this name fenced", "–", "–"),
    (
        "kafka.transaction.flushed",
        "the messages in an open transaction, invisible",
        "–",
        "Kafka aborts them; the caller sends them again",
    ),
    (
        "kafka.transaction.committing",
        "the same",
        "the messages visible",
        "nobody has told the caller: it sends them again under the same ids",
    ),
    ("kafka.transaction.committed", "the messages", "–", "the same"),
    ("kafka.transaction.aborted", "nothing of the block", "–", "–"),
    ("kafka.producer.replaced", "nothing of the block, or all", "–", "read in the log, by the messages' offsets"),
    (
        "producer.confirmed",
        "the message, on every replica in sync",
        "–",
        "the caller has not been told: it sends it again under the same id",
    ),
    ("producer.waiting", "what was confirmed before", "–", "what was not confirmed may be there or not"),
    ("producer.broken", "what was confirmed before", "–", "what was not confirmed may be there or not"),
)

PUBLISH: tuple[Row, ...] = (
    (
        "publish.committing",
        "nothing of the user's transaction",
        "the user's rows and the outbox rows",
        "both or neither: the user's own rows say which",
    ),
)
