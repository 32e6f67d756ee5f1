"""Where transforms began: what Kafka cannot remember once a group's offsets have expired.

Revision ID: eo0003

Expands only: code of eo0002 runs on this schema.
"""

from __future__ import annotations

from alembic import op

from eoframework.db import joined

revision = "eo0003"
down_revision = "eo0002"
branch_labels = None
depends_on = None


def _statement(eo: str) -> str:
    # begun: the group has an offset there since; without it "no offset" would mean both "not yet" and "lost".
    return f"""
        CREATE TABLE {eo}.transform_start (
            consumer_id integer NOT NULL REFERENCES {eo}.consumer (id),
            topic_id uuid NOT NULL,
            partition integer NOT NULL CHECK (partition >= 0),
            topic text NOT NULL,
            cluster_id text NOT NULL,
            start_offset bigint NOT NULL CHECK (start_offset >= 0),
            begun boolean NOT NULL DEFAULT false,
            created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
            PRIMARY KEY (consumer_id, topic_id, partition)
        )"""


def upgrade() -> None:
    op.execute(_statement(joined.entering(down_revision)))
    joined.now_at(revision)


def downgrade() -> None:
    eo = joined.leaving()
    # Without these rows a transform whose offsets are lost would begin anew, and send everything again.
    op.execute(
        f"""
        DO $$ BEGIN
            IF EXISTS (SELECT FROM {eo}.transform_start) THEN
                RAISE EXCEPTION 'transforms have begun here, and the older code does not know them. '
                    'Forget them first: eo position forget';
            END IF;
        END $$"""
    )
    op.execute(f"DROP TABLE {eo}.transform_start")
    joined.now_at(down_revision)
