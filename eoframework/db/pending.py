"""What the relay does with outbox rows: select them by state, and delete exactly those that stand in Kafka."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import Connection

from eoframework.checkpoint import Checkpoint, digest_of
from eoframework.db.outbox import decode_headers
from eoframework.db.shards import Claim, ShardLost, Shards
from eoframework.errors import FailClosed
from eoframework.failures import MAX_ERROR, clean
from eoframework.message import Headers

_MESSAGE: Final = "id, shard, topic, key, type, source, content_type, payload, headers, traceparent, created_at"

# The first NOT EXISTS is asked once a statement: without holds nothing is looked up or hashed for any row (no
# difference measurable at 100,000 rows). With holds each row that waits costs about 1 microsecond a select, and a row
# without a key is never held. One statement, one snapshot: a row that went back to its place and its open key are seen
# together.
_NOT_HELD: Final = """(NOT EXISTS (SELECT FROM {eo}.outbox_held)
                            OR NOT EXISTS (SELECT FROM {eo}.outbox_held AS h
                                            WHERE h.topic = m.topic AND h.key_digest = sha256(m.key)))"""

# By state, never by a cursor over ids or transaction ids: a lower seq can be committed after a higher one, and a
# gate on the oldest open transaction stalls on anybody's.
# The sum over sizes bounds what a batch takes in memory; PostgreSQL reads them without fetching the payloads.
# Headers as text: whoever writes rows by hand may write any JSON, and one row that the driver cannot read would end
# every batch it is in.
_SELECT: Final = """
    SELECT seq, id, topic, key, type, source, content_type, payload, headers::text, traceparent, created_at,
           current_setting('synchronous_standby_names') <> ''
      FROM (SELECT *, sum(size) OVER (ORDER BY seq) - size AS before
              FROM (SELECT *, coalesce(octet_length(payload), 0)::bigint AS size
                      FROM {eo}.outbox_message AS m
                     WHERE shard = %(shard)s AND topic <> ALL (%(paused)s::text[])
                       AND EXISTS (SELECT FROM {eo}.relay_shard WHERE shard = %(shard)s AND epoch = %(epoch)s)
                       AND {not_held}
                     ORDER BY seq LIMIT %(limit)s) AS head) AS sized
     WHERE before < %(bytes)s
     ORDER BY seq""".replace("{not_held}", _NOT_HELD)

_MOVE_DUE: Final = f"""
    WITH due AS (
        DELETE FROM {{eo}}.delayed_message WHERE (shard, deliver_at, seq) IN (
            SELECT shard, deliver_at, seq FROM {{eo}}.delayed_message
             WHERE shard = %(shard)s AND deliver_at <= clock_timestamp()
             ORDER BY deliver_at, seq LIMIT %(limit)s FOR UPDATE SKIP LOCKED)
        RETURNING deliver_at, seq, {_MESSAGE})
    INSERT INTO {{eo}}.outbox_message ({_MESSAGE}) SELECT {_MESSAGE} FROM due ORDER BY deliver_at, seq"""

_LOST: Final = """
    SELECT s.batch_no, m.seq, m.id FROM {eo}.relay_shard s
      LEFT JOIN {eo}.outbox_message m ON m.shard = s.shard AND m.seq = ANY (%(seqs)s::bigint[])
     WHERE s.shard = %(shard)s ORDER BY m.seq"""

_ANY_LEFT: Final = """
    SELECT EXISTS (SELECT FROM {eo}.outbox_message AS m
                    WHERE shard = ANY (%(among)s::smallint[]) AND seq <= %(seq)s
                      AND topic <> ALL (%(paused)s::text[]) AND {not_held})""".replace("{not_held}", _NOT_HELD)

# One statement, so that neither a hold without its letter nor a letter without its hold is ever seen. ON CONFLICT: only
# the owner of a key's shard holds it, so none is expected; should a person have moved rows between shards, the key
# waits for the first letter rather than ending the relay again and again.
_BURY: Final = f"""
    WITH mine AS (SELECT FROM {{eo}}.relay_shard WHERE shard = %(shard)s AND epoch = %(epoch)s FOR UPDATE),
         gone AS (DELETE FROM {{eo}}.outbox_message
                   WHERE shard = %(shard)s AND seq = %(seq)s AND EXISTS (SELECT FROM mine)
               RETURNING seq, {_MESSAGE}),
         letter AS (
            INSERT INTO {{eo}}.dead_letter (
                   origin, message_id, topic, key, type, source, content_type, payload, headers, traceparent,
                   created_at, outbox_seq, cause, error_class, fingerprint, holds)
            SELECT 'outbox', id, topic, key, type, source, content_type, payload, headers, traceparent,
                   created_at, seq, %(cause)s, %(error_class)s, %(fingerprint)s, %(hold)s AND key IS NOT NULL
              FROM gone
         RETURNING id, topic, key, holds),
         held AS (INSERT INTO {{eo}}.outbox_held (topic, key_digest, dead_letter_id)
                  SELECT topic, sha256(key), id FROM letter WHERE holds ON CONFLICT DO NOTHING)
    SELECT id, holds FROM letter"""


MALFORMED: Final = "malformed headers"
"""The kind of refusal of a row whose headers are not what `encode_headers` writes."""


class OutboxRow(NamedTuple):
    """An outbox message as it lies in the database."""

    seq: int
    id: UUID
    topic: str
    key: bytes | None
    type: str
    source: str
    content_type: str
    payload: bytes | None
    headers: Headers
    traceparent: str | None
    created_at: datetime
    unreadable: str = ""
    """Why it cannot be made into a record; then it can never be sent."""


class Refusal(NamedTuple):
    """Why a row can never be sent."""

    what: str
    kind: str
    """Kafka's name of the error, such as MSG_SIZE_TOO_LARGE."""


class Buried(NamedTuple):
    """The dead letter's number, and whether the later rows of its key wait for a person."""

    dead_letter: int
    holds: bool


@dataclass(frozen=True, slots=True)
class Selection:
    """The head of a shard; `replicated` says that COMMITs of this database wait for a standby."""

    rows: list[OutboxRow]
    replicated: bool


class RowsDiffer(FailClosed):
    """The rows in the database are not those of the checkpoint."""


class PendingRows:
    """The tables `outbox_message`, `delayed_message` and `dead_letter`, as the owner of a shard uses them."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._select = shards.sql(_SELECT)
        self._move_due = shards.sql(_MOVE_DUE)

    def select(self, claim: Claim, *, limit: int, max_bytes: int, paused: Iterable[str]) -> Selection:
        """The first rows of the shard in `seq` order, without those of paused topics; none when it is not ours."""
        values = {
            "shard": claim.shard,
            "epoch": claim.epoch,
            "limit": limit,
            "bytes": max_bytes,
            "paused": list(paused),
        }
        with self._shards.in_index_order(f"selecting outbox rows of {claim}") as connection:
            # The driver's own cursor in binary format: payloads, ids and times arrive without a detour through text.
            cursor = connection.connection.cursor(binary=True)
            cursor.execute(self._select, values)
            found = cursor.fetchall()
            cursor.close()
        return Selection([_row(row) for row in found], bool(found) and bool(found[0][-1]))

    def settle_on_standby(self, claim: Claim) -> None:
        """Return when every row visible until now is on the synchronous standby too.

        After a crash restart rows are visible before the standby has them; published and then lost by a failover,
        they would be effects without a cause. Our own COMMIT waits for the standby up to a later place in the log.
        """
        with self._shards.writing(f"waiting for the standby of {claim}") as connection:
            connection.exec_driver_sql("SELECT pg_logical_emit_message(true, 'eo.relay', '')")

    def remove(self, claim: Claim, rows: Sequence[OutboxRow], *, batch_no: int, next_batch_no: int) -> None:
        """Delete exactly these rows and count the batch, in one transaction, if the shard is still ours.

        On a crash: both or neither. Raises ShardLost, and FailClosed when rows or batch number are not as this owner
        left them (nothing is deleted then).
        """
        with self._shards.writing(f"deleting published rows of {claim}") as connection:
            self._count_batch(connection, claim, batch_no, next_batch_no)
            self._delete(connection, claim, [row.seq for row in rows])

    def remove_published(self, claim: Claim, checkpoint: Checkpoint) -> None:
        """Delete the rows of a batch whose Kafka transaction was committed by someone who could not delete them.

        Raises RowsDiffer, deleting nothing, unless the rows are the very ones the checkpoint names.
        """
        statement = """
            SELECT seq, id FROM {eo}.outbox_message WHERE shard = %(shard)s AND seq = ANY (%(seqs)s::bigint[])
             ORDER BY seq FOR UPDATE"""
        values = {"shard": claim.shard, "seqs": list(checkpoint.seqs)}
        with self._shards.writing(f"deleting the published rows of {claim}'s predecessor") as connection:
            self._count_batch(connection, claim, checkpoint.batch_no - 1, checkpoint.batch_no)
            found = connection.exec_driver_sql(self._shards.sql(statement), values).all()
            if digest_of((row[0], row[1]) for row in found) != checkpoint.digest:
                raise RowsDiffer(f"{_differing(len(found), checkpoint)}.")
            self._delete(connection, claim, checkpoint.seqs)

    def lost(self, checkpoint: Checkpoint) -> str | None:
        """What this database does not know of the batch, in words; None when it has counted it or holds its rows.

        One statement, so one snapshot: the rows of a batch are deleted in the transaction that counts it.
        """
        values = {"shard": checkpoint.shard, "seqs": list(checkpoint.seqs)}
        with self._shards.single(f"looking for batch {checkpoint.batch_no}") as connection:
            found = connection.exec_driver_sql(self._shards.sql(_LOST), values).all()
        counted = found[0][0] if found else checkpoint.batch_no
        if checkpoint.batch_no <= counted:
            return None
        if checkpoint.batch_no > counted + 1:
            return f"Kafka's last batch is {checkpoint.batch_no}, the database's is {counted}"
        rows = [(row[1], row[2]) for row in found if row[1] is not None]
        return None if digest_of(rows) == checkpoint.digest else _differing(len(rows), checkpoint)

    def bury(self, claim: Claim, row: OutboxRow, refusal: Refusal, *, hold: bool) -> Buried:
        """Move a row that can never be sent to the dead letters, with its cause; with `hold` its key waits then.

        On a crash: all of it or nothing. The letter keeps the row's `seq`, so that it can go back before the rows that
        wait. Raises ShardLost.
        """
        values = {
            "shard": claim.shard,
            "epoch": claim.epoch,
            "seq": row.seq,
            "hold": hold,
            "cause": clean(refusal.what, MAX_ERROR),
            "error_class": clean(refusal.kind, 200),
            "fingerprint": hashlib.sha256(f"{refusal.kind}\0{row.topic}".encode()).hexdigest()[:12],
        }
        with self._shards.writing(f"moving outbox row {row.seq} to the dead letters") as connection:
            found = connection.exec_driver_sql(self._shards.sql(_BURY), values).one_or_none()
            if found is None:
                raise ShardLost(f"relay {claim} has been taken over.")
        return Buried(*found)

    def move_due(self, shard: int, *, limit: int) -> int:
        """Let delayed rows whose time has come join the outbox; returns how many.

        Whoever does it, each row moves once: it is deleted there and inserted here by one statement.
        """
        with self._shards.single(f"moving due rows of shard {shard}") as connection:
            return int(connection.exec_driver_sql(self._move_due, {"shard": shard, "limit": limit}).rowcount)

    def last_seq(self) -> int:
        """The highest `seq` there is now, 0 when the outbox is empty."""
        with self._shards.single("looking for the outbox's end") as connection:
            found = connection.exec_driver_sql(
                self._shards.sql("SELECT coalesce(max(seq), 0) FROM {eo}.outbox_message")
            )
            return int(found.scalar_one())

    def any_left(self, *, up_to: int, paused: Iterable[str], among: Iterable[int]) -> bool:
        """Whether a row of these shards with `seq` up to this one can still be sent: paused topics, held keys aside."""
        values = {"seq": up_to, "paused": list(paused), "among": list(among)}
        with self._shards.single("looking for what is left in the outbox") as connection:
            return bool(connection.exec_driver_sql(self._shards.sql(_ANY_LEFT), values).scalar_one())

    def held_keys(self) -> int:
        """How many keys wait for a person, because an earlier row of theirs could not be sent."""
        with self._shards.single("counting the outbox's held keys") as connection:
            found = connection.exec_driver_sql(self._shards.sql("SELECT count(*) FROM {eo}.outbox_held"))
            return int(found.scalar_one())

    def _count_batch(self, connection: Connection, claim: Claim, batch_no: int, next_batch_no: int) -> None:
        # First, because it locks the shard's row: a successor's claim then comes wholly before or wholly after.
        statement = """
            UPDATE {eo}.relay_shard SET batch_no = %(next)s
             WHERE shard = %(shard)s AND epoch = %(epoch)s AND batch_no = %(expected)s"""
        values = {"shard": claim.shard, "epoch": claim.epoch, "expected": batch_no, "next": next_batch_no}
        if connection.exec_driver_sql(self._shards.sql(statement), values).rowcount == 1:
            return
        found = connection.exec_driver_sql(
            self._shards.sql("SELECT batch_no FROM {eo}.relay_shard WHERE shard = %(shard)s AND epoch = %(epoch)s"),
            values,
        ).one_or_none()
        if found is None:
            raise ShardLost(f"relay {claim} has been taken over.")
        raise FailClosed(
            f"batch_no of relay {claim} is {found[0]}, this relay left it at {batch_no}: someone else changed it.",
            remedy="Only relays may write to relay_shard; start the relay again, it compares with the checkpoint.",
        )

    def _delete(self, connection: Connection, claim: Claim, seqs: Sequence[int]) -> None:
        gone = connection.exec_driver_sql(
            self._shards.sql(
                "DELETE FROM {eo}.outbox_message WHERE shard = %(shard)s AND seq = ANY (%(seqs)s::bigint[])"
            ),
            {"shard": claim.shard, "seqs": list(seqs)},
        ).rowcount
        if gone != len(seqs):
            raise FailClosed(
                f"{len(seqs)} rows of {claim} were published, only {gone} of them are still in the outbox.",
                remedy="Only relays may delete outbox rows. Find who else does; the rest of the batch is kept.",
            )


def _row(found: Any) -> OutboxRow:
    row = OutboxRow(*found[:11])
    return row if row.headers is None else _with_headers(row, found[8])


def _with_headers(row: OutboxRow, stored: str) -> OutboxRow:
    try:
        found = json.loads(stored)
        if not isinstance(found, list | None):
            raise TypeError("no list")
        headers = tuple(decode_headers(found))
        for name, _ in headers:
            # The client ends the process (SIGSEGV) over a name that is no UTF-8, and cuts one off at its first NUL.
            if not isinstance(name, str) or b"\0" in name.encode():
                raise TypeError("a name that cannot be sent")
        return row._replace(headers=headers)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        why = f"its stored headers are malformed: {type(error).__name__}: {error}."
        return row._replace(headers=(), unreadable=why)


def _differing(there: int, checkpoint: Checkpoint) -> str:
    return (
        f"{there} of the {len(checkpoint.seqs)} numbers of batch {checkpoint.batch_no} are in the database, but not as "
        "the rows that were published"
    )
