"""The position rows: where each consumer stands in each partition, and who may move it on.

PostgreSQL is the truth for the position (DESIGN.md, "Central rule"): the row is moved in the same transaction as the
effects, so reading it answers every question about what happened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from eoframework.db.links import link_of
from eoframework.errors import RestartNeeded
from eoframework.schema import Schema

_CONSUMER = """
INSERT INTO {eo}.consumer (name, topic) VALUES (%(name)s, %(topic)s)
ON CONFLICT (name) DO UPDATE SET topic = excluded.topic RETURNING id
"""
_SIBLINGS = "SELECT name FROM {eo}.consumer WHERE topic = %(topic)s AND starts_with(name, %(prefix)s)"
_KNOWN = """
SELECT topic, topic_id, cluster_id, partition, next_offset, epoch, owner FROM {eo}.position
WHERE consumer_id = %(consumer_id)s AND topic = %(topic)s ORDER BY partition
"""
_START = """
INSERT INTO {eo}.position (consumer_id, topic_id, partition, topic, cluster_id, next_offset)
SELECT %(consumer_id)s, %(topic_id)s, p, %(topic)s, %(cluster_id)s, o
FROM unnest(%(partitions)s::int[], %(offsets)s::bigint[]) AS start(p, o) ORDER BY p
ON CONFLICT DO NOTHING
"""
# No id was recorded for what another program processed up to there (db/coverage.py).
_UNCOVERED = """
INSERT INTO {eo}.coverage AS old (consumer_id, topic_id, partition, covered_from)
SELECT %(consumer_id)s, %(topic_id)s, p, o FROM unnest(%(partitions)s::int[], %(offsets)s::bigint[]) AS start(p, o)
ORDER BY p
ON CONFLICT (consumer_id, topic_id, partition) DO UPDATE
    SET covered_from = greatest(old.covered_from, excluded.covered_from)
"""
# Behind a pooler no session is ours: the next transaction runs in another one, and this one serves somebody else.
_SESSION = "CASE WHEN NOT %(pooled)s THEN a.pid END, CASE WHEN NOT %(pooled)s THEN a.backend_start END"
_CLAIM = """
INSERT INTO {eo}.position AS p (consumer_id, topic_id, partition, topic, cluster_id, next_offset,
    epoch, owner, backend_pid, backend_start, claimed_at)
SELECT %(consumer_id)s, %(topic_id)s, %(partition)s, %(topic)s, %(cluster_id)s, 0,
    1, %(owner)s, {session}, clock_timestamp()
FROM pg_stat_activity a WHERE a.pid = pg_backend_pid() AND EXISTS (SELECT FROM {eo}.position
    WHERE consumer_id = %(consumer_id)s AND topic_id = %(topic_id)s)
ON CONFLICT (consumer_id, topic_id, partition) DO UPDATE SET epoch = p.epoch + 1, owner = excluded.owner,
    unclean_at = CASE WHEN %(marked)s THEN p.next_offset END,
    backend_pid = excluded.backend_pid, backend_start = excluded.backend_start, claimed_at = excluded.claimed_at
RETURNING next_offset, epoch
""".replace("{session}", _SESSION)
_HOLDER = """
SELECT owner, next_offset = unclean_at FROM {eo}.position
WHERE consumer_id = %(consumer_id)s AND topic_id = %(topic_id)s AND partition = %(partition)s FOR NO KEY UPDATE
"""
_RECLAIM = """
UPDATE {eo}.position SET epoch = epoch + 1, (backend_pid, backend_start) = ROW({session}),
    claimed_at = clock_timestamp()
FROM pg_stat_activity a WHERE a.pid = pg_backend_pid() AND consumer_id = %(consumer_id)s
    AND topic_id = %(topic_id)s AND partition = %(partition)s AND epoch = %(epoch)s
RETURNING next_offset, epoch
""".replace("{session}", _SESSION)
# The rows are locked in partition order first: an UPDATE ... FROM unnest locks in join order, and two workers that
# dispute two partitions would deadlock.
_ADVANCE = """
WITH fence AS (
    SELECT * FROM unnest(%(partitions)s::int[], %(epochs)s::bigint[], %(expected)s::bigint[], %(next)s::bigint[])
        AS f(partition, epoch, expected, next)
), locked AS (
    SELECT p.partition FROM {eo}.position p WHERE p.consumer_id = %(consumer_id)s AND p.topic_id = %(topic_id)s
        AND p.partition = ANY(%(partitions)s::int[]) ORDER BY p.partition FOR NO KEY UPDATE
)
UPDATE {eo}.position p SET next_offset = f.next FROM fence f JOIN locked USING (partition)
WHERE p.consumer_id = %(consumer_id)s AND p.topic_id = %(topic_id)s AND p.partition = f.partition
    AND p.epoch = f.epoch AND p.next_offset = f.expected
RETURNING p.partition
"""
_HELD = """
SELECT p.partition FROM {eo}.position p
JOIN unnest(%(partitions)s::int[], %(epochs)s::bigint[]) AS f(partition, epoch) USING (partition, epoch)
WHERE p.consumer_id = %(consumer_id)s AND p.topic_id = %(topic_id)s
"""
_CUT = """
UPDATE {eo}.position p SET next_offset = f.next
FROM unnest(%(partitions)s::int[], %(next)s::bigint[]) AS f(partition, next)
WHERE p.consumer_id = %(consumer_id)s AND p.topic_id = %(topic_id)s AND p.partition = f.partition
"""
_RELEASE = """
UPDATE {eo}.position p SET owner = NULL, backend_pid = NULL, backend_start = NULL
FROM unnest(%(partitions)s::int[], %(epochs)s::bigint[]) AS f(partition, epoch)
WHERE p.consumer_id = %(consumer_id)s AND p.topic_id = %(topic_id)s AND p.partition = f.partition
    AND p.epoch = f.epoch
RETURNING p.partition
"""
# xmax of the visible version is the transaction that holds the row: with it the recorded backend is terminated only
# while it really stands in the way, never because its pid was used again. Behind a pooler the owner's name, which its
# transactions carry (session_name), stands for the backend: whoever else holds the row is let be.
_TERMINATE = """
SELECT pg_terminate_backend(a.pid) FROM {eo}.position p JOIN pg_stat_activity a
    ON a.backend_xid::text = p.xmax::text AND CASE WHEN p.backend_pid IS NULL
        THEN a.application_name = 'eo ' || right(p.owner, 60) AND a.datname = current_database()
        ELSE a.pid = p.backend_pid AND a.backend_start = p.backend_start END
WHERE p.consumer_id = %(consumer_id)s AND p.topic_id = %(topic_id)s AND p.partition = %(partition)s
"""


def session_name(owner: str) -> str:
    """How an owner's transactions are named behind a pooler; 63 bytes are what PostgreSQL keeps of a name."""
    return "eo " + owner[-60:]


@dataclass(frozen=True, slots=True)
class Stream:
    """One consumer's view of one topic: what a position row belongs to."""

    consumer_id: int
    consumer: str
    topic: str
    topic_id: UUID
    cluster_id: str

    def key(self) -> dict[str, object]:
        return {"consumer_id": self.consumer_id, "topic_id": self.topic_id}

    def row(self) -> dict[str, object]:
        return {**self.key(), "topic": self.topic, "cluster_id": self.cluster_id}


@dataclass(frozen=True, slots=True)
class Claim:
    """Our right to move one partition on: valid as long as the row still shows this epoch and this offset."""

    partition: int
    epoch: int
    next_offset: int
    unclean: bool = False
    """The owner before us did not release it: it may have died of a message."""
    stuck: bool = False
    """And so did another, at the same offset: a message that ends its process lets nobody get on, while a process that
    was killed for another reason has nearly always moved the position."""
    marked: bool = False
    """Nobody has got on since a death: what the dead owner had charged may still stand at this offset."""

    def moved(self, next_offset: int) -> Claim:
        return replace(self, next_offset=next_offset)


@dataclass(frozen=True, slots=True)
class PositionRow:
    """A position as stored, for start-up checks and for people."""

    topic: str
    topic_id: UUID
    cluster_id: str
    partition: int
    next_offset: int
    epoch: int
    owner: str | None


class Positions:
    """Reads and moves position rows; every method is one statement in the caller's transaction."""

    def __init__(self, schema: Schema) -> None:
        self._sql = {name: schema.sql(text) for name, text in _STATEMENTS.items()}

    def register(self, connection: Connection, *, name: str, topic: str) -> int:
        """The consumer's number; its row stays locked, so first starts of several workers come one after another."""
        return int(self._one(connection, "consumer", {"name": name, "topic": topic})[0])

    def siblings(self, connection: Connection, *, topic: str, app: str | None = None) -> set[str]:
        """The names of the known consumers of the topic: this app's, or everybody's."""
        prefix = "" if app is None else f"{app}."
        return {row[0] for row in self._all(connection, "siblings", {"topic": topic, "prefix": prefix})}

    def known(self, connection: Connection, *, consumer_id: int, topic: str) -> list[PositionRow]:
        """All rows for this topic name, also those of an earlier topic or another cluster of that name."""
        rows = self._all(connection, "known", {"consumer_id": consumer_id, "topic": topic})
        return [PositionRow(*row) for row in rows]

    def start(
        self, connection: Connection, stream: Stream, offsets: Mapping[int, int], *, adopted: bool = False
    ) -> None:
        """Store where a consumer begins; a row that exists is left alone.

        `adopted`: what lies before was processed by another program, which recorded no ids.
        """
        values = {"partitions": list(offsets), "offsets": list(offsets.values())}
        connection.exec_driver_sql(self._sql["start"], {**stream.row(), **values})
        if adopted:
            connection.exec_driver_sql(self._sql["uncovered"], {**stream.key(), **values})

    def claim(self, connection: Connection, stream: Stream, partition: int, *, owner: str) -> Claim:
        """Take the partition over: everybody who held it before can change nothing any more.

        Waits for a transaction of the previous owner that is still open. A partition without a row appeared after
        the consumer's first start and begins at 0; where no partition has a row, `eo position forget` came after our
        registration, and beginning at 0 would ignore `start`: raises RestartNeeded.
        """
        values = {**stream.row(), "partition": partition, "owner": owner, "pooled": link_of(connection).pooled}
        holder, died_here = next(iter(self._all(connection, "holder", values)), (None, False))
        unclean = holder not in {None, owner}
        # Somebody between may have left in order, and not have got on either.
        marked = unclean or bool(died_here)
        found = self._all(connection, "claim", {**values, "marked": marked})
        if not found:
            raise RestartNeeded(
                f"{stream.consumer}: its positions were forgotten while it started.", remedy="Start it again."
            )
        stuck = unclean and bool(died_here)
        return Claim(partition, found[0][1], found[0][0], unclean=unclean, stuck=stuck, marked=marked)

    def claim_again(self, connection: Connection, stream: Stream, claim: Claim) -> Claim | None:
        """Renew our own claim after a doubt, None when somebody else has taken over meanwhile.

        Waits on the row lock of our own transaction if that one is still being committed, so what it returns is what
        happened: a plain SELECT could read the value from before.
        """
        values = {**stream.key(), "partition": claim.partition, "epoch": claim.epoch}
        found = self._all(connection, "reclaim", {**values, "pooled": link_of(connection).pooled})
        return replace(claim, next_offset=found[0][0], epoch=found[0][1]) if found else None

    def advance(
        self, connection: Connection, stream: Stream, claims: Iterable[Claim], to: Mapping[int, int]
    ) -> set[int]:
        """Move the positions on; returns the partitions that are no longer ours (empty: all moved).

        `next_offset = expected` and not `<=`: the weaker guard would accept a row that somebody else wrote.
        """
        held = sorted(claims, key=lambda claim: claim.partition)
        values = {
            "partitions": [claim.partition for claim in held],
            "epochs": [claim.epoch for claim in held],
            "expected": [claim.next_offset for claim in held],
            "next": [to[claim.partition] for claim in held],
        }
        moved = {row[0] for row in self._all(connection, "advance", {**stream.key(), **values})}
        return {claim.partition for claim in held} - moved

    def lost(self, connection: Connection, stream: Stream, claims: Iterable[Claim]) -> set[int]:
        """The partitions whose row is no longer ours, without waiting for a message to find out."""
        epochs = {claim.partition: claim.epoch for claim in claims}
        values = {"partitions": list(epochs), "epochs": list(epochs.values())}
        held = {row[0] for row in self._all(connection, "held", {**stream.key(), **values})}
        return epochs.keys() - held

    def cut(self, connection: Connection, stream: Stream, to: Mapping[int, int]) -> None:
        """Take part of an `advance` of this same transaction back; the rows are locked and ours."""
        values = {"partitions": list(to), "next": list(to.values())}
        connection.exec_driver_sql(self._sql["cut"], {**stream.key(), **values})

    def release(self, connection: Connection, stream: Stream, claims: Iterable[Claim]) -> set[int]:
        """Say that we left cleanly; changes nothing where a successor has claimed already. Returns the others."""
        held = sorted(claims, key=lambda claim: claim.partition)
        values = {"partitions": [c.partition for c in held], "epochs": [c.epoch for c in held]}
        return {row[0] for row in self._all(connection, "release", {**stream.key(), **values})}

    def terminate_holder(self, connection: Connection, stream: Stream, partition: int) -> bool:
        """End the recorded backend if it holds the row: a frozen owner in ClientWrite meets no timeout otherwise."""
        return bool(self._all(connection, "terminate", {**stream.key(), "partition": partition}))

    def _all(self, connection: Connection, name: str, values: dict[str, object]) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in connection.exec_driver_sql(self._sql[name], values)]

    def _one(self, connection: Connection, name: str, values: dict[str, object]) -> tuple[Any, ...]:
        return self._all(connection, name, values)[0]


_STATEMENTS = {
    "consumer": _CONSUMER,
    "siblings": _SIBLINGS,
    "known": _KNOWN,
    "start": _START,
    "uncovered": _UNCOVERED,
    "holder": _HOLDER,
    "claim": _CLAIM,
    "reclaim": _RECLAIM,
    "advance": _ADVANCE,
    "held": _HELD,
    "cut": _CUT,
    "release": _RELEASE,
    "terminate": _TERMINATE,
}
