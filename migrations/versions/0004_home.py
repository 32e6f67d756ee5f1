"""Where the database lives, so that a copy of it is not taken for the database itself.

Revision ID: eo0004

Expands only: code of eo0003 runs on this schema.
"""

from __future__ import annotations

from alembic import op

from eoframework.db import joined

revision = "eo0004"
down_revision = "eo0003"
branch_labels = None
depends_on = None


def _statements(eo: str) -> list[str]:
    return [
        # Columns of a table that every role may read already, so no rights have to be given anew.
        f"ALTER TABLE {eo}.outbox ADD COLUMN home text, ADD COLUMN copied_from uuid",
        # Only where it may be asked: a provider may have taken that right away, and then nothing is compared.
        f"""
        DO $$ BEGIN
            IF has_function_privilege('pg_control_system()', 'EXECUTE') THEN
                UPDATE {eo}.outbox SET home = (SELECT c.system_identifier || '/' || d.oid
                    FROM pg_control_system() c, pg_database d WHERE d.datname = current_database());
            END IF;
        END $$""",
    ]


def upgrade() -> None:
    for statement in _statements(joined.entering(down_revision)):
        op.execute(statement)
    joined.now_at(revision)


def downgrade() -> None:
    op.execute(f"ALTER TABLE {joined.leaving()}.outbox DROP COLUMN home, DROP COLUMN copied_from")
    joined.now_at(down_revision)
