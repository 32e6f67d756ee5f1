"""The boundaries of what people do, and of housekeeping: (name, durable before, durable after, leads to)."""

from __future__ import annotations

Row = tuple[str, str, str, str]

REPLAY: tuple[Row, ...] = (
    (
        "replay.moving",
        "nothing of this letter; the letters before it wait in their lanes",
        "the message in its lane, due; the letter and its id gone; the audit row",
        "it is still dead; the command is issued again",
    ),
    (
        "replay.moved",
        "the letter is gone, its message waits in its lane, its id is forgotten, the audit row is there",
        "–",
        "–",
    ),
    (
        "dead.discarding",
        "nothing of the change",
        "the letter gone, its key open; the audit row",
        "rolled back; say it again",
    ),
    ("dead.discarded", "the letter gone, its key open; the audit row", "–", "said again: not found"),
    (
        "parked.discarding",
        "nothing of this lane; the lanes before it are gone",
        "its messages gone, their ids processed; the audit row",
        "rolled back; say it again",
    ),
    ("parked.discarded", "the lane's messages gone, their ids processed; the audit row", "–", "said again: the rest"),
    ("outbox.retrying", "nothing of the change", "row back, key open, audit row", "rolled back; say it again"),
    ("outbox.retried", "row back, key open, audit row", "–", 'said again: "is no more", by whom and when'),
    ("outbox.discarding", "nothing of the change", "row gone, key open, audit row", "rolled back; say it again"),
    ("outbox.discarded", "row gone, key open, audit row", "–", 'said again: "is no more", by whom and when'),
    (
        "external.resolving",
        "nothing of the change",
        "the call's result, or that it is free; the audit row",
        "rolled back; say it again",
    ),
    ("external.resolved", "the call's result, or that it is free; the audit row", "–", "–"),
)

PRUNE: tuple[Row, ...] = (
    (
        "prune.covered",
        "coverage raised, no id forgotten yet",
        "a slice of ids gone",
        "some remembered messages count as forgotten; nothing is repeated",
    ),
    ("prune.forgotten", "the slice of ids gone; coverage said so before", "–", "the next slice follows"),
    (
        "prune.results_forgotten",
        "results of calls gone whose messages are forgotten too",
        "–",
        "the next slice follows",
    ),
)

MIGRATE: tuple[Row, ...] = (
    ("migrate.changing", "the old version, whole: what ran so far is in one transaction", "–", "the old version"),
    ("migrate.changed", "the old version, whole: this step is in the transaction too", "–", "the old version"),
    (
        "migrate.committing",
        "the old version, whole",
        "the new version, whole",
        "the old or the new version; say it again",
    ),
    ("migrate.committed", "the new version, whole", "–", "said again: at that version already"),
)

OPERATE: tuple[Row, ...] = (
    (
        "position.moving",
        "nothing of the change",
        "a handler's position, its new epoch (a transform's offset: below)",
        "rolled back; say it again",
    ),
    (
        "position.moved",
        "the position, or the group's offset, and that it was set",
        "a handler's group follows",
        "the next claim knows the group's offset for an older one",
    ),
    (
        "position.moved_in_kafka",
        "the group's offset; of a transform not yet that it was set",
        "of a transform: that it was set",
        "the next worker begins there",
    ),
    (
        "position.forgotten_in_kafka",
        "the group is gone, the positions are not",
        "the positions gone",
        "a handler goes on, a transform refuses; say it again",
    ),
    (
        "position.forgetting",
        "nothing of the change in the database",
        "the positions gone (a transform's after the group)",
        "rolled back; say it again",
    ),
    ("position.forgotten", "positions and group are gone", "–", "its next start is a first start"),
    ("grants.applying", "the old rights, whole", "the new rights, whole", "the old or the new rights; say it again"),
    ("grants.applied", "the new rights, whole", "–", "–"),
)
