"""Our version files inside a chain that is not ours: a user's own alembic environment runs them.

There, their version table says what was applied, wherever it is. Ours keeps a copy of our part: processes check their
tables at start, and know nothing of that environment.
"""

from __future__ import annotations

from alembic import context, op
from sqlalchemy import Connection, text

from eoframework import events
from eoframework.errors import ConfigurationError
from eoframework.schema import Schema
from eoframework.settings import Settings

_DEFAULT_SCHEMA = "public"

VERSION_TABLE = "alembic_version"
COPY = "joined_version"
"""Where our version stands when alembic keeps it elsewhere. Another name than alembic's: a role that is called like our
schema has it first in its search_path ("$user", public), and would take our table for its own."""


def schema() -> Schema:
    """Where the version files make our tables: what `eo db` was told, else EO_DATABASE_SCHEMA."""
    told = context.config.attributes.get("eo_schema")
    return told if isinstance(told, Schema) else Schema(Settings.load().database_schema)


def entering(down_revision: str | None) -> str:
    """First thing in an upgrade: the schema exists, and is at the version before; returns its quoted name.

    Raises ConfigurationError, in a chain that is not ours, when the tables are at another version: made by `eo db`.
    """
    ours = schema()
    if _chain() is not None:
        # Not IF NOT EXISTS where it can be asked: that wants the right to create schemas even if it is there.
        if context.is_offline_mode() or not _exists(ours):
            op.execute(f"CREATE SCHEMA IF NOT EXISTS {ours.sql('{eo}')}")
        if not context.is_offline_mode():
            _refuse_other(ours, down_revision)
    _tell("migrate.changing", down_revision)
    return ours.sql("{eo}")


def leaving() -> str:
    """First thing in a downgrade: the quoted name of the schema."""
    _tell("migrate.changing", None)
    return schema().sql("{eo}")


def now_at(revision: str | None) -> None:
    """Last thing in an upgrade or downgrade: our copy of the version follows, in the same transaction."""
    _note(revision)
    _tell("migrate.changed", revision)


def _note(revision: str | None) -> None:
    chain = _chain()
    if chain is None:
        return
    table = schema().sql(f"{{eo}}.{COPY}")
    if revision is None:
        op.execute(f"DROP TABLE {table}")
        return
    op.execute(f"CREATE TABLE IF NOT EXISTS {table} (version_num text NOT NULL, chain text NOT NULL)")
    op.execute(f"DELETE FROM {table}")
    name = chain.replace("'", "''")
    op.execute(f"INSERT INTO {table} (version_num, chain) VALUES ('{revision}', '{name}')")


def _tell(event: str, version: str | None) -> None:
    # Printed as SQL, nothing of it happens here.
    if not context.is_offline_mode():
        events.emit(event, version=version)


def is_joined(connection: Connection, ours: Schema) -> bool:
    """Whether our tables belong to a chain whose versions stand elsewhere; needs no right on anything."""
    return has(connection, ours.name, COPY)


def copied(connection: Connection, ours: Schema) -> tuple[str, str] | None:
    """Our version and the version table of the chain that our tables belong to; None when that chain is our own."""
    if not has(connection, ours.name, COPY):
        return None
    found = connection.execute(text(ours.sql(f"SELECT version_num, chain FROM {{eo}}.{COPY}"))).one()
    return str(found[0]), str(found[1])


def _chain() -> str | None:
    """The version table that alembic itself writes, if it is not ours."""
    running = context.get_context()
    place = running.version_table_schema
    if place is None and not context.is_offline_mode():
        # Wherever the search_path leads.
        found = """SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.oid = to_regclass(quote_ident(:table))"""
        place = op.get_bind().execute(text(found), {"table": running.version_table}).scalar()
    place = place or _DEFAULT_SCHEMA
    if (place, running.version_table) == (schema().name, VERSION_TABLE):
        return None
    return f"{place}.{running.version_table}"


def has(connection: Connection, schema: str, table: str) -> bool:
    """Whether this very schema has it, wherever the search_path leads."""
    found = connection.execute(
        text("""SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = :schema AND c.relname = :table"""),
        {"schema": schema, "table": table},
    )
    return found.first() is not None


def _exists(ours: Schema) -> bool:
    found = op.get_bind().execute(text("SELECT FROM pg_namespace WHERE nspname = :schema"), {"schema": ours.name})
    return found.first() is not None


def _refuse_other(ours: Schema, down_revision: str | None) -> None:
    connection = op.get_bind()
    copy = copied(connection, ours)
    found = copy[0] if copy is not None else _ours_alone(connection, ours)
    if found == down_revision:
        return
    stamp = found or "eoframework@base"
    raise ConfigurationError(
        f"schema {ours.name!r} is at version {found or 'none'}, not at {down_revision or 'none'}, where this alembic "
        "environment believes it to be: it was changed by eo db.",
        remedy=f"Tell it once: alembic stamp {stamp}; from then on change it with alembic alone.",
    )


def _ours_alone(connection: Connection, ours: Schema) -> str | None:
    if not has(connection, ours.name, VERSION_TABLE):
        return None
    return connection.execute(text(ours.sql(f"SELECT version_num FROM {{eo}}.{VERSION_TABLE}"))).scalar()
