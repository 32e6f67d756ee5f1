"""The spine: consumers, positions, processed messages, outbox, relay shards, dead letters.

Revision ID: eo0001
"""

from __future__ import annotations

from alembic import op

from eoframework.db import joined

revision = "eo0001"
down_revision = None
branch_labels = ("eoframework",)
depends_on = None

# Hot tables live on insert + delete or on HOT updates: autovacuum must come by count, not by share of a table that is
# empty most of the time.
_HOT = "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0"

_MESSAGE_COLUMNS = """
    id uuid NOT NULL,
    shard smallint NOT NULL,
    topic text NOT NULL,
    key bytea,
    type text NOT NULL,
    source text NOT NULL,
    content_type text NOT NULL,
    payload bytea,
    headers json,
    traceparent text,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
"""


def _statements(eo: str) -> list[str]:
    return [
        f"""
        CREATE TABLE {eo}.consumer (
            id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            name text NOT NULL UNIQUE,
            topic text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )""",
        f"""
        CREATE TABLE {eo}.position (
            consumer_id integer NOT NULL REFERENCES {eo}.consumer (id),
            topic_id uuid NOT NULL,
            partition integer NOT NULL CHECK (partition >= 0),
            topic text NOT NULL,
            cluster_id text NOT NULL,
            next_offset bigint NOT NULL CHECK (next_offset >= 0),
            epoch bigint NOT NULL DEFAULT 0,
            owner text,
            backend_pid integer,
            backend_start timestamptz,
            claimed_at timestamptz,
            PRIMARY KEY (consumer_id, topic_id, partition),
            CHECK ((owner IS NULL) OR (claimed_at IS NOT NULL AND epoch > 0))
        ) WITH (fillfactor = 50, {_HOT})""",
        f"""
        CREATE TABLE {eo}.processed_message (
            consumer_id integer NOT NULL REFERENCES {eo}.consumer (id),
            message_id uuid NOT NULL,
            processed_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT processed_message_pkey PRIMARY KEY (consumer_id, message_id)
        ) WITH ({_HOT})""",
        f"CREATE INDEX processed_message_age ON {eo}.processed_message USING brin (processed_at)",
        f"""
        CREATE TABLE {eo}.outbox (
            id uuid NOT NULL PRIMARY KEY DEFAULT gen_random_uuid(),
            shards smallint NOT NULL CHECK (shards BETWEEN 1 AND 256),
            only_one boolean NOT NULL DEFAULT true UNIQUE CHECK (only_one),
            created_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )""",
        f"""
        CREATE TABLE {eo}.outbox_message (
            seq bigint GENERATED ALWAYS AS IDENTITY,
            {_MESSAGE_COLUMNS},
            PRIMARY KEY (shard, seq)
        ) WITH ({_HOT})""",
        f"""
        CREATE TABLE {eo}.delayed_message (
            seq bigint GENERATED ALWAYS AS IDENTITY,
            {_MESSAGE_COLUMNS},
            deliver_at timestamptz NOT NULL,
            PRIMARY KEY (shard, deliver_at, seq)
        ) WITH ({_HOT})""",
        f"""
        CREATE TABLE {eo}.relay_shard (
            shard smallint PRIMARY KEY,
            owner text,
            epoch bigint NOT NULL DEFAULT 0,
            lease_until timestamptz,
            batch_no bigint NOT NULL DEFAULT 0,
            cluster_id text,
            checkpoint_topic_id uuid,
            CHECK ((owner IS NULL) = (lease_until IS NULL)),
            CHECK ((cluster_id IS NULL) = (checkpoint_topic_id IS NULL))
        ) WITH (fillfactor = 50, {_HOT})""",
        f"""
        CREATE TABLE {eo}.relay_member (
            owner text PRIMARY KEY,
            lease_until timestamptz NOT NULL
        )""",
        f"""
        CREATE TABLE {eo}.dead_letter (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            origin text NOT NULL CHECK (origin IN ('outbox')),
            message_id uuid NOT NULL,
            topic text NOT NULL,
            key bytea,
            type text NOT NULL,
            source text NOT NULL,
            content_type text NOT NULL,
            payload bytea,
            headers json,
            traceparent text,
            created_at timestamptz NOT NULL,
            cause text NOT NULL,
            died_at timestamptz NOT NULL DEFAULT clock_timestamp()
        )""",
        f"INSERT INTO {eo}.outbox (shards) VALUES (4)",
        f"INSERT INTO {eo}.relay_shard (shard) SELECT generate_series(0, 3)",
    ]


def upgrade() -> None:
    for statement in _statements(joined.entering(down_revision)):
        op.execute(statement)
    joined.now_at(revision)


def downgrade() -> None:
    eo = joined.leaving()
    tables = (
        "dead_letter relay_member relay_shard delayed_message outbox_message outbox processed_message position consumer"
    )
    for table in tables.split():
        op.execute(f"DROP TABLE {eo}.{table}")
    joined.now_at(down_revision)
