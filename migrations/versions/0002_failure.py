"""When a handler fails: parked messages, attempts, dead letters of handlers, audit; what reprocessing rests on.

Revision ID: eo0002

Expands only: code of eo0001 runs on this schema.
"""

from __future__ import annotations

from alembic import op

from eoframework.db import joined

revision = "eo0002"
down_revision = "eo0001"
branch_labels = None
depends_on = None

_HOT = "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0"

_PLACE = """
    consumer_id integer NOT NULL REFERENCES {eo}.consumer (id),
    topic_id uuid NOT NULL,
    partition integer NOT NULL
"""
_FAILURE = """
    attempts integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
    crashes integer NOT NULL DEFAULT 0 CHECK (crashes >= 0),
    first_failed_at timestamptz,
    last_failed_at timestamptz,
    error_class text,
    fingerprint text,
    error text,
    traceback text
"""


def _statements(eo: str) -> list[str]:
    place, failure = _PLACE.replace("{eo}", eo), _FAILURE
    return [
        # All that is changed below, in the order in which running workers take it: whoever took processed_message first
        # and then waited for position would meet batches that hold position and wait for processed_message, for as long
        # as there are any (seen: 27 deadlocks in a row).
        f"LOCK TABLE {eo}.position, {eo}.processed_message, {eo}.consumer, {eo}.dead_letter IN ACCESS EXCLUSIVE MODE",
        # A lane is what keeps its order: a key, or a message that has none.
        f"""
        CREATE TABLE {eo}.parked_key (
            {place},
            lane uuid NOT NULL,
            key bytea,
            due_at timestamptz NOT NULL,
            held boolean NOT NULL DEFAULT false,
            since timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (consumer_id, topic_id, partition, lane)
        ) WITH (fillfactor = 70, {_HOT})""",
        f"CREATE INDEX parked_key_due ON {eo}.parked_key (consumer_id, topic_id, partition, due_at) WHERE NOT held",
        # The foreign key: whatever races with whatever, a lane is not opened while a message waits in it.
        f"""
        CREATE TABLE {eo}.parked_message (
            {place},
            lane uuid NOT NULL,
            "offset" bigint NOT NULL,
            topic text NOT NULL,
            message_id uuid,
            key bytea,
            value bytea,
            headers json,
            timestamp bigint NOT NULL,
            unreadable text NOT NULL DEFAULT '',
            parked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            {failure},
            PRIMARY KEY (consumer_id, topic_id, partition, lane, "offset"),
            FOREIGN KEY (consumer_id, topic_id, partition, lane) REFERENCES {eo}.parked_key
        ) WITH (fillfactor = 70, {_HOT})""",
        # Messages that are tried again where they lie: a partition that waits, or one that was left by a crash.
        f"""
        CREATE TABLE {eo}.attempt (
            {place},
            "offset" bigint NOT NULL,
            {failure},
            PRIMARY KEY (consumer_id, topic_id, partition, "offset")
        ) WITH (fillfactor = 70, {_HOT})""",
        f"""
        ALTER TABLE {eo}.dead_letter
            ADD COLUMN consumer_id integer REFERENCES {eo}.consumer (id),
            ADD COLUMN topic_id uuid,
            ADD COLUMN partition integer,
            ADD COLUMN "offset" bigint,
            ADD COLUMN lane uuid,
            ADD COLUMN timestamp bigint,
            ADD COLUMN unreadable text NOT NULL DEFAULT '',
            ADD COLUMN has_id boolean NOT NULL DEFAULT true,
            ADD COLUMN holds boolean NOT NULL DEFAULT false,
            ADD COLUMN attempts integer NOT NULL DEFAULT 0,
            ADD COLUMN crashes integer NOT NULL DEFAULT 0,
            ADD COLUMN first_failed_at timestamptz,
            ADD COLUMN last_failed_at timestamptz,
            ADD COLUMN error_class text,
            ADD COLUMN fingerprint text,
            ADD COLUMN error text,
            ADD COLUMN traceback text,
            ADD COLUMN outbox_seq bigint,
            ALTER COLUMN type DROP NOT NULL,
            ALTER COLUMN source DROP NOT NULL,
            ALTER COLUMN content_type DROP NOT NULL,
            DROP CONSTRAINT dead_letter_origin_check,
            ADD CONSTRAINT dead_letter_origin_check CHECK (
                origin = 'outbox' AND type IS NOT NULL AND source IS NOT NULL AND content_type IS NOT NULL
                OR origin = 'handler' AND num_nulls(consumer_id, topic_id, partition, "offset", timestamp) = 0)""",
        # One message is one dead letter, however often it is read and dies.
        f"""
        CREATE UNIQUE INDEX dead_letter_place ON {eo}.dead_letter (consumer_id, topic_id, partition, "offset")
            WHERE origin = 'handler'""",
        # Asked for each letter that is replayed or discarded: whether another one still holds its lane.
        f"""
        CREATE INDEX dead_letter_holds ON {eo}.dead_letter (consumer_id, topic_id, partition, lane)
            WHERE origin = 'handler' AND holds""",
        f"CREATE INDEX dead_letter_fingerprint ON {eo}.dead_letter (fingerprint)",
        f"CREATE INDEX dead_letter_outbox ON {eo}.dead_letter (id) WHERE origin = 'outbox'",
        # When the id was recorded; processed_at is when it was last seen. Rows from before: no later than they are.
        f"ALTER TABLE {eo}.processed_message ADD COLUMN first_at timestamptz NOT NULL DEFAULT 'epoch'",
        f"ALTER TABLE {eo}.processed_message ALTER COLUMN first_at SET DEFAULT now()",
        # Dead letters in a row, without a success between: what the breaker of a restarted worker goes on from.
        f"ALTER TABLE {eo}.consumer ADD COLUMN dead_run integer NOT NULL DEFAULT 0",
        # Where a partition stood when it was last taken over from an owner that had not released it.
        f"ALTER TABLE {eo}.position ADD COLUMN unclean_at bigint",
        f"""
        CREATE TABLE {eo}.audit (
            id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            at timestamptz NOT NULL DEFAULT clock_timestamp(),
            actor text NOT NULL,
            action text NOT NULL,
            subject text NOT NULL,
            detail json NOT NULL
        )""",
        f"CREATE INDEX audit_subject ON {eo}.audit (subject, id)",
        # Below this offset ids may have been forgotten: sending those messages through again would repeat effects. No
        # column of `position`: raising it would wait for the batch that holds the row, and make the next one wait.
        # What was pruned before this revision is not known, so everything before it counts as forgotten.
        f"""
        CREATE TABLE {eo}.coverage (
            {place},
            covered_from bigint NOT NULL,
            PRIMARY KEY (consumer_id, topic_id, partition)
        )""",
        f"""
        INSERT INTO {eo}.coverage (consumer_id, topic_id, partition, covered_from)
            SELECT consumer_id, topic_id, partition, next_offset FROM {eo}.position""",
        # Whatever transaction began before `at` moved the position no further than `reached`.
        f"""
        CREATE TABLE {eo}.position_sample (
            {place},
            at timestamptz NOT NULL,
            reached bigint NOT NULL,
            PRIMARY KEY (consumer_id, topic_id, partition, at)
        )""",
        f"""
        CREATE TABLE {eo}.external_call (
            consumer_id integer NOT NULL REFERENCES {eo}.consumer (id),
            message_id uuid NOT NULL,
            name text NOT NULL,
            id bigint GENERATED ALWAYS AS IDENTITY,
            partition integer NOT NULL,
            "offset" bigint NOT NULL,
            fence bigint NOT NULL CHECK (fence > 0),
            calls integer NOT NULL CHECK (calls > 0),
            owner text,
            lease_until timestamptz NOT NULL,
            claimed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            done_at timestamptz,
            settled_at timestamptz,
            error_class text,
            result json,
            PRIMARY KEY (consumer_id, message_id, name),
            CHECK (result IS NULL OR done_at IS NOT NULL)
        ) WITH (fillfactor = 70, {_HOT})""",
        f"CREATE INDEX external_call_age ON {eo}.external_call USING brin (claimed_at)",
        f"CREATE INDEX external_call_open ON {eo}.external_call (id) WHERE done_at IS NULL",
        # Keys whose later outbox rows wait for a person, because an earlier one could not be sent.
        f"""
        CREATE TABLE {eo}.outbox_held (
            topic text NOT NULL,
            key_digest bytea NOT NULL,
            dead_letter_id bigint NOT NULL REFERENCES {eo}.dead_letter (id),
            since timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (topic, key_digest)
        )""",
        # Each deleted dead letter is looked for here, by the foreign key.
        f"CREATE UNIQUE INDEX outbox_held_letter ON {eo}.outbox_held (dead_letter_id)",
    ]


def upgrade() -> None:
    for statement in _statements(joined.entering(down_revision)):
        op.execute(statement)
    joined.now_at(revision)


def downgrade() -> None:
    eo = joined.leaving()
    # What is parked would be lost without a word; dead letters of handlers are unknown to the older code.
    op.execute(
        f"""
        DO $$ BEGIN
            IF EXISTS (SELECT FROM {eo}.parked_message) OR EXISTS (SELECT FROM {eo}.dead_letter
                WHERE origin = 'handler') OR EXISTS (SELECT FROM {eo}.outbox_held) THEN
                RAISE EXCEPTION 'messages are parked, dead or held: going back would lose them. '
                    'Let them run, or discard them with: eo dead discard';
            END IF;
        END $$"""
    )
    tables = "outbox_held external_call position_sample coverage audit attempt parked_message parked_key"
    for table in tables.split():
        op.execute(f"DROP TABLE {eo}.{table}")
    op.execute(f"ALTER TABLE {eo}.consumer DROP COLUMN dead_run")
    op.execute(f"ALTER TABLE {eo}.position DROP COLUMN unclean_at")
    op.execute(f"ALTER TABLE {eo}.processed_message DROP COLUMN first_at")
    op.execute(f"DROP INDEX {eo}.dead_letter_outbox")
    columns = (
        'consumer_id topic_id partition "offset" lane timestamp unreadable has_id holds attempts crashes '
        "first_failed_at last_failed_at error_class fingerprint error traceback outbox_seq"
    )
    drops = ", ".join(f"DROP COLUMN {column}" for column in columns.split())
    op.execute(
        f"""
        ALTER TABLE {eo}.dead_letter DROP CONSTRAINT dead_letter_origin_check, {drops},
            ALTER COLUMN type SET NOT NULL, ALTER COLUMN source SET NOT NULL, ALTER COLUMN content_type SET NOT NULL,
            ADD CONSTRAINT dead_letter_origin_check CHECK (origin IN ('outbox'))"""
    )
    joined.now_at(down_revision)
