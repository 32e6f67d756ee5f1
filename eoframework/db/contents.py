"""Everything that stands in the application's own tables, to be compared: before and after, run and run again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from eoframework.db import joined
from eoframework.db.grants import TABLES
from eoframework.db.outbox import decode_headers
from eoframework.message import Headers
from eoframework.schema import Schema

# What a migration tool remembers is no effect of a message.
_NOT_EFFECTS = ("alembic_version",)
_OURS = (*TABLES, joined.COPY)
_TABLES = """
SELECT format('%%I.%%I', n.nspname, c.relname),
    coalesce((SELECT json_agg(a.attname) FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid
        AND a.attnum = ANY(i.indkey) WHERE i.indrelid = c.oid AND i.indisprimary), '[]'),
    coalesce((SELECT json_agg(a.attname) FROM pg_attribute a
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            AND (a.attidentity <> '' OR pg_get_expr(d.adbin, d.adrelid) LIKE 'nextval(%%')), '[]')
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND n.nspname NOT LIKE 'pg\\_%%' AND n.nspname <> 'information_schema'
    AND c.relname <> ALL(%(names)s::text[]) AND NOT (n.nspname = %(schema)s AND c.relname = ANY(%(ours)s::text[]))
ORDER BY 1
"""
_ROWS = "SELECT to_jsonb(t)::text FROM ONLY {table} t"
_SEQUENCES = """
SELECT setval(c.oid, (SELECT coalesce(s.last_value, 0) FROM pg_sequences s
    WHERE s.schemaname = n.nspname AND s.sequencename = c.relname) + %(by)s)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind = 'S' AND n.nspname NOT LIKE 'pg\\_%%' AND NOT EXISTS (SELECT FROM pg_depend d
    JOIN pg_class t ON t.oid = d.refobjid WHERE d.objid = c.oid AND d.deptype IN ('a', 'i')
        AND n.nspname = %(schema)s AND t.relname = ANY(%(ours)s::text[]))
"""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """One table and all its rows, in no order."""

    name: str
    rows: tuple[Row, ...]
    key: tuple[str, ...] = ()
    """The columns of its primary key."""
    numbered: tuple[str, ...] = ()
    """The columns that a sequence fills: they tell in which order rows were made."""


def read(connection: Connection, schema: Schema) -> dict[str, Table]:
    """All tables but ours and the system's, with all their rows; for databases as small as a test's."""
    # By name: the application's own tables may be in our schema (a role named like it has it first in its search_path).
    given = {"schema": schema.name, "ours": list(_OURS), "names": list(_NOT_EFFECTS)}
    found = {}
    for name, key, numbered in connection.exec_driver_sql(_TABLES, given).all():
        statement = _ROWS.replace("{table}", name)
        rows = connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
        found[name] = Table(name, tuple(json.loads(row[0]) for row in rows), tuple(key), tuple(numbered))
    return found


def ours(schema: Schema) -> frozenset[str]:
    """The names of our tables, as `read` would write them."""
    return frozenset(f"{schema.name}.{name}" for name in _OURS)


def advance_sequences(connection: Connection, schema: Schema, *, by: int) -> None:
    """Let every sequence of the application go on `by` numbers later: what is made of its numbers shows then."""
    connection.exec_driver_sql(_SEQUENCES, {"schema": schema.name, "ours": list(_OURS), "by": by})


@dataclass(frozen=True, slots=True)
class OutboxRow:
    """A message in the outbox, as its reader will see it."""

    id: UUID
    topic: str
    key: bytes | None
    payload: bytes | None
    headers: Headers


def published(connection: Connection, schema: Schema) -> list[OutboxRow]:
    """What waits for the relay, in the order of the commits; what is delayed comes last."""
    rows: list[OutboxRow] = []
    for table in ("outbox_message", "delayed_message"):
        statement = "SELECT id, topic, key, payload, headers FROM {eo}.{table} ORDER BY seq".replace("{table}", table)
        for identity, topic, key, payload, headers in connection.exec_driver_sql(schema.sql(statement)).all():
            rows.append(OutboxRow(identity, topic, key, payload, tuple(decode_headers(headers))))
    return rows


def outbox_of(connection: Connection, schema: Schema) -> tuple[UUID, int]:
    """The outbox's id, and how many shards it has."""
    found = connection.exec_driver_sql(schema.sql("SELECT id, shards FROM {eo}.outbox")).one()
    return found[0], found[1]


def waiting(connection: Connection, schema: Schema) -> int:
    """How many messages wait to be published, or to be tried again; those that wait for a person do not count."""
    statement = """
        SELECT (SELECT count(*) FROM {eo}.outbox_message m WHERE NOT EXISTS (SELECT FROM {eo}.outbox_held h
                    WHERE h.topic = m.topic AND h.key_digest = sha256(m.key)))
            + (SELECT count(*) FROM {eo}.delayed_message)
            + (SELECT count(*) FROM {eo}.parked_message m JOIN {eo}.parked_key k
                    USING (consumer_id, topic_id, partition, lane) WHERE NOT k.held)
    """
    return int(connection.exec_driver_sql(schema.sql(statement)).scalar_one())


def stands(connection: Connection, schema: Schema) -> dict[tuple[str, str, int], int]:
    """Where each handler stands: (consumer, topic, partition) -> next offset."""
    statement = """
        SELECT c.name, p.topic, p.partition, p.next_offset FROM {eo}.position p
        JOIN {eo}.consumer c ON c.id = p.consumer_id
    """
    found = connection.exec_driver_sql(schema.sql(statement)).all()
    return {(row[0], row[1], row[2]): row[3] for row in found}


def letters(connection: Connection, schema: Schema) -> list[Row]:
    """The dead letters, without what is another in each run: numbers and times."""
    statement = """
        SELECT coalesce(c.name, 'relay'), d.topic, encode(d.key, 'escape'), encode(d.payload, 'escape'), d.error_class,
            d.error
        FROM {eo}.dead_letter d LEFT JOIN {eo}.consumer c ON c.id = d.consumer_id ORDER BY d.id
    """
    names = ("consumer", "topic", "key", "payload", "error_class", "error")
    found = connection.exec_driver_sql(schema.sql(statement)).all()
    return [dict(zip(names, row, strict=True)) for row in found]
