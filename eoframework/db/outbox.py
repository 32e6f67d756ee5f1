"""The outbox table: rows that wait for the relay. Insert and delete only, never updated."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Final

from sqlalchemy import Connection

from eoframework.keys import order_bucket, shard_hash
from eoframework.message import Headers, OutboxMessage
from eoframework.schema import Schema

# The shard is computed by the statement that inserts, from the count of this very moment: a count remembered by a
# long-lived writer would send a key to a shard that no longer owns it.
_INSERT: Final = """
    INSERT INTO {eo}.{table} (id, shard, topic, key, type, source, content_type, payload, headers,
                              traceparent{extra_column})
    SELECT m.id, mod(m.hash, (SELECT shards FROM {eo}.outbox))::smallint, m.topic, m.key, m.type, m.source,
           m.content_type, m.payload, m.headers::json, m.traceparent{extra_value}
      FROM unnest(%(id)s::uuid[], %(hash)s::bigint[], %(topic)s::text[], %(key)s::bytea[], %(type)s::text[],
                  %(source)s::text[], %(content_type)s::text[], %(payload)s::bytea[], %(headers)s::text[],
                  %(traceparent)s::text[]{extra_array})
           WITH ORDINALITY AS m(id, hash, topic, key, type, source, content_type, payload, headers,
                                traceparent{extra_name}, place)
     ORDER BY m.place"""

# With synchronous_commit off a row is visible before its COMMIT is on disk: published by then, and taken back by a
# crash of the server, it would be a message without a cause.
_DURABLE: Final = """SELECT set_config('synchronous_commit', 'on', true)
     WHERE current_setting('synchronous_commit') IN ('off', 'local')"""


class Outbox:
    """Writes outbox messages; one value per schema, holds no state."""

    def __init__(self, schema: Schema) -> None:
        self._now = _insert_statement(schema, "outbox_message")
        self._delayed = _insert_statement(schema, "delayed_message", delayed=True)
        # Advisory locks are per database, not per schema: two outboxes of one database must not wait for each other.
        self._lock_class = zlib.crc32(schema.name.encode()) - 2**31

    def insert(self, connection: Connection, messages: Sequence[OutboxMessage]) -> None:
        """Add `messages` to the outbox, in their order, as part of the caller's transaction.

        On a crash: they exist if and only if the caller's transaction was committed. Per key the relay's order is the
        order of commits: the key locks taken here are held until the transaction ends, so this must be the last
        statement before COMMIT, and called once a transaction. Flush the session before.
        """
        if not messages:
            return
        self._prepare(connection, messages)
        due = [message for message in messages if message.deliver_at is None]
        delayed = [message for message in messages if message.deliver_at is not None]
        if due:
            connection.exec_driver_sql(self._now, _columns(due))
        if delayed:
            deliver_at = [message.deliver_at for message in delayed]
            connection.exec_driver_sql(self._delayed, _columns(delayed) | {"deliver_at": deliver_at})

    def _prepare(self, connection: Connection, messages: Iterable[OutboxMessage]) -> None:
        """Keep the keys' order, and have the COMMIT wait for its own durability."""
        # A delayed message leaves its key's order, so it takes no lock.
        ordered = (m.key for m in messages if m.ordered and m.key is not None and m.deliver_at is None)
        buckets = sorted({order_bucket(key) for key in ordered})
        # Deferred constraints are checked before the locks: a check that waits for another writer while holding a
        # bucket that this writer wants would be a deadlock. Sorted for the same reason. One round trip for all: the
        # numbers are ours, so they can stand in the text, which lets the server take several statements at once.
        numbers = ",".join(map(str, buckets))
        connection.exec_driver_sql(
            f"SET CONSTRAINTS ALL IMMEDIATE; {_DURABLE}; "
            f"SELECT pg_advisory_xact_lock({self._lock_class}, bucket) FROM unnest(ARRAY[{numbers}]::int[]) AS bucket",
            execution_options={"no_parameters": True},
        )


def encode_headers(headers: Headers) -> str | None:
    """Headers as JSON text: a list of [name, value], a value that is not UTF-8 as {"base64": ...}; order is kept."""
    if not headers:
        return None
    return json.dumps([[name, _encode_value(value)] for name, value in headers])


def decode_headers(stored: object) -> list[tuple[str, bytes | None]]:
    """The headers that `encode_headers` wrote, from the JSON value that the driver hands back."""
    if stored is None:
        return []
    assert isinstance(stored, list)
    return [(name, _decode_value(value)) for name, value in stored]


def _encode_value(value: bytes | None) -> str | dict[str, str] | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def _decode_value(value: str | dict[str, str] | None) -> bytes | None:
    if value is None:
        return None
    return value.encode() if isinstance(value, str) else base64.b64decode(value["base64"])


def _insert_statement(schema: Schema, table: str, *, delayed: bool = False) -> str:
    extras = {
        "{table}": table,
        "{extra_column}": ", deliver_at" if delayed else "",
        "{extra_value}": ", m.deliver_at" if delayed else "",
        "{extra_array}": ", %(deliver_at)s::timestamptz[]" if delayed else "",
        "{extra_name}": ", deliver_at" if delayed else "",
    }
    statement = _INSERT
    for mark, text in extras.items():
        statement = statement.replace(mark, text)
    return schema.sql(statement)


def _columns(messages: Sequence[OutboxMessage]) -> dict[str, object]:
    return {
        "id": [m.id for m in messages],
        "hash": [shard_hash(m.key, m.id.bytes) for m in messages],
        "topic": [m.topic for m in messages],
        "key": [m.key for m in messages],
        "type": [m.type for m in messages],
        "source": [m.source for m in messages],
        "content_type": [m.content_type for m in messages],
        "payload": [m.payload for m in messages],
        "headers": [encode_headers(m.headers) for m in messages],
        "traceparent": [m.traceparent for m in messages],
    }
