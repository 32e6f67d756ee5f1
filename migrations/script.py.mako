"""${message}

Revision ID: ${up_revision}
"""

from __future__ import annotations

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    eo = joined.entering(down_revision)
    op.execute(f"... {eo}.table ...")
    joined.now_at(revision)


def downgrade() -> None:
    eo = joined.leaving()
    op.execute(f"... {eo}.table ...")
    joined.now_at(down_revision)
