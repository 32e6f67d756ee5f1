"""Our tables' versions: applied, shown, checked and printed, from a checkout or from an installed wheel."""

from __future__ import annotations

import io
import logging
import re
import shlex
import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, inspect, text

from eoframework import clock, events
from eoframework.db import joined
from eoframework.db.joined import VERSION_TABLE
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, Conflict, NotFound, SchemaOutOfDate
from eoframework.schema import Schema

_log = logging.getLogger(__name__)

# By name it may only be asked for by who may look into the schema.
_READABLE = """
SELECT CASE WHEN has_schema_privilege(:schema, 'USAGE') THEN has_table_privilege(:table, 'SELECT') ELSE false END
"""

# What our versions are called; a chain of the user's may stand in the same table.
_OURS = re.compile(r"eo\d{4}")
# A change of a table waits until nobody is in it, and everybody who comes later waits behind it. So it waits briefly,
# is taken back and tried again; and it may meet workers that hold one table and want another, in their own order.
_LOCK_WAIT = "3s"
_PATIENCE = 60.0
_PAUSE = 0.5

# alembic's environment lives in globals of its modules.
_ONE_AT_A_TIME = threading.Lock()

_PACKAGE = Path(__file__).resolve().parent.parent


def location() -> Path:
    """Where the version files are: inside the package of an installed wheel, beside it in a checkout."""
    for directory in (_PACKAGE / "migrations", _PACKAGE.parent / "migrations"):
        if (directory / "env.py").is_file():
            return directory
    raise ConfigurationError("eoframework's version files are missing.", remedy="Install eoframework again.")


def head() -> str:
    """The version this code needs."""
    (revision,) = _scripts().get_heads()
    return revision


def versions() -> list[str]:
    """All that this code knows, the oldest first."""
    return [script.revision for script in _scripts().walk_revisions()][::-1]


def current(database: Database) -> str | None:
    """The version of the database, None when our tables are not there."""
    with database.begin("reading the schema's version") as connection:
        return _current(connection, database.schema)


def check(database: Database) -> str:
    """Return the version if it is the one this code needs; changes nothing.

    Raises SchemaOutOfDate, which names the command to run: `eo db upgrade` for an older schema (or alembic's own, where
    our tables belong to a chain of the user's), a newer release of eoframework for a newer schema.
    """
    needed = head()
    with database.begin("reading the schema's version") as connection:
        found = _current(connection, database.schema)
        chain = _chain(connection, database.schema)
    if found == needed:
        return needed
    where, remedy = _where(database.schema), "Run: eo db upgrade" if chain is None else "Run: alembic upgrade heads"
    if found is None:
        raise SchemaOutOfDate(f"{where} has none of eoframework's tables.", remedy=remedy)
    _refuse_newer(database.schema, found)
    raise SchemaOutOfDate(f"{where} is at version {found}, this code needs {needed}.", remedy=remedy)


def upgrade(database: Database, revision: str = "head") -> str | None:
    """Bring the schema to `revision` in one transaction; two that run at once apply it once.

    Workers may go on meanwhile: each attempt holds them up for a few seconds at most. On a crash: nothing of it
    happened. Returns the version it is at then. Raises Conflict when the tables are never free for a minute.
    """
    return _attempt(database, command.upgrade, revision, "upgrading the schema")


def downgrade(database: Database, revision: str) -> str | None:
    """Take the schema back to `revision` ("base": our tables and everything in them are gone), in one transaction."""
    return _attempt(database, command.downgrade, revision, "downgrading the schema")


def _attempt(database: Database, action: object, revision: str, what: str) -> str | None:
    deadline = clock.monotonic() + _PATIENCE
    while True:
        try:
            return _change(database, action, revision, what)
        except Conflict as error:
            if clock.monotonic() > deadline:
                raise
            _log.info("%s; nothing of it happened, trying again.", error)
        clock.sleep(_PAUSE)


def _change(database: Database, action: object, revision: str, what: str) -> str | None:
    with database.begin(what) as connection:
        found = _current(connection, database.schema)
        _refuse_newer(database.schema, found)
        chain = _chain(connection, database.schema)
        if chain is not None and revision == "head" and found == head():
            return found
        _refuse_joined(database.schema, chain)
        connection.execute(text("SELECT set_config('lock_timeout', :wait, true)"), {"wait": _LOCK_WAIT})
        _run(action, database.schema, revision, connection)
        reached = _current(connection, database.schema)
        events.emit("migrate.committing", version=reached)
    events.emit("migrate.committed", version=reached)
    return reached


def sql(schema: Schema, revision: str = "head") -> str:
    """The SQL of an upgrade, for a DBA to apply; needs no database.

    `revision` may be a range, "eo0001:head", for a database that already has the first.
    """
    config = _config(schema)
    _call(command.upgrade, config, revision, sql=True)
    assert isinstance(config.output_buffer, io.StringIO)
    return config.output_buffer.getvalue()


def _current(connection: Connection, schema: Schema) -> str | None:
    copy = _copied(connection, schema)
    if copy is not None:
        return copy[0]
    return next((found for found in _heads(connection, schema) if _OURS.fullmatch(found)), None)


def _copied(connection: Connection, schema: Schema) -> tuple[str, str] | None:
    if not inspect(connection).has_table(joined.COPY, schema=schema.name):
        return None
    _refuse_unreadable(connection, schema, joined.COPY)
    return joined.copied(connection, schema)


def _heads(connection: Connection, schema: Schema) -> tuple[str, ...]:
    if not inspect(connection).has_table(VERSION_TABLE, schema=schema.name):
        return ()
    _refuse_unreadable(connection, schema, VERSION_TABLE)
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "version_table_schema": schema.name}
    )
    return context.get_current_heads()


def _chain(connection: Connection, schema: Schema) -> str | None:
    """The version table of the user's chain that our tables belong to; None when they are on their own."""
    copy = _copied(connection, schema)
    if copy is not None:
        return copy[1]
    foreign = [found for found in _heads(connection, schema) if not _OURS.fullmatch(found)]
    return f"{schema.name}.{VERSION_TABLE}" if foreign else None


def _refuse_joined(schema: Schema, chain: str | None) -> None:
    if chain is not None:
        raise ConfigurationError(
            f"{_where(schema)} belongs to another alembic environment, whose versions are in {chain}: changed from "
            "here, that one would no longer know what there is.",
            remedy="There: alembic upgrade heads (or downgrade eoframework@...).",
        )


def _refuse_unreadable(connection: Connection, schema: Schema, name: str) -> None:
    table = f'"{schema.name}".{name}'
    values = {"schema": schema.name, "table": table}
    if not connection.scalar(text(_READABLE), values):
        role = connection.scalar(text("SELECT current_user::text"))
        raise ConfigurationError(
            f"database role {role!r} may not read {table}.",
            remedy=f"As owner: eo db grants --app {shlex.quote(str(role))} --apply (or --relay, --observer; without "
            "--apply it prints the SQL).",
        )


def _refuse_newer(schema: Schema, found: str | None) -> None:
    if found is not None and found not in {script.revision for script in _scripts().walk_revisions()}:
        raise SchemaOutOfDate(
            f"{_where(schema)} is at version {found}, made by a newer eoframework; this one knows {head()}.",
            remedy="Install the newer release: pip install --upgrade eoframework",
        )


def _where(schema: Schema) -> str:
    return f"schema {schema.name!r} of this database"


def _run(action: object, schema: Schema, revision: str, connection: Connection) -> None:
    config = _config(schema)
    config.attributes["connection"] = connection
    _call(action, config, revision)


def _call(action: object, config: Config, revision: str, **options: object) -> None:
    assert callable(action)
    try:
        with _ONE_AT_A_TIME:
            action(config, revision, **options)
    except CommandError as error:
        raise NotFound(f"{error}.", remedy="Versions are listed in the migrations folder.") from error


def _config(schema: Schema) -> Config:
    config = Config(output_buffer=io.StringIO(), stdout=io.StringIO())
    # "%" would be read as an interpolation.
    config.set_main_option("script_location", str(location()).replace("%", "%%"))
    config.attributes["eo_schema"] = schema
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(location()))
