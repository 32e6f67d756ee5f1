"""Our tables' versions: applied, shown, checked and printed, from a checkout or from an installed wheel."""

from __future__ import annotations

import io
import shlex
import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, inspect, text

from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, NotFound, SchemaOutOfDate
from eoframework.schema import Schema

VERSION_TABLE = "alembic_version"

# By name it may only be asked for by who may look into the schema.
_READABLE = """
SELECT CASE WHEN has_schema_privilege(:schema, 'USAGE') THEN has_table_privilege(:table, 'SELECT') ELSE false END
"""

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


def current(database: Database) -> str | None:
    """The version of the database, None when our tables are not there."""
    with database.begin("reading the schema's version") as connection:
        return _current(connection, database.schema)


def check(database: Database) -> str:
    """Return the version if it is the one this code needs; changes nothing.

    Raises SchemaOutOfDate, which names the command to run: `eo db upgrade` for an older schema, a newer release of
    eoframework for a newer schema.
    """
    needed, found = head(), current(database)
    if found == needed:
        return needed
    where = _where(database.schema)
    if found is None:
        raise SchemaOutOfDate(f"{where} has none of eoframework's tables.", remedy="Run: eo db upgrade")
    _refuse_newer(database.schema, found)
    raise SchemaOutOfDate(f"{where} is at version {found}, this code needs {needed}.", remedy="Run: eo db upgrade")


def upgrade(database: Database, revision: str = "head") -> str | None:
    """Bring the schema to `revision` in one transaction; two that run at once apply it once.

    On a crash: nothing of it happened. Returns the version it is at then.
    """
    with database.begin("upgrading the schema") as connection:
        _refuse_newer(database.schema, _current(connection, database.schema))
        _run(command.upgrade, database.schema, revision, connection)
        return _current(connection, database.schema)


def downgrade(database: Database, revision: str) -> str | None:
    """Take the schema back to `revision` ("base": our tables and everything in them are gone), in one transaction."""
    with database.begin("downgrading the schema") as connection:
        _refuse_newer(database.schema, _current(connection, database.schema))
        _run(command.downgrade, database.schema, revision, connection)
        return _current(connection, database.schema)


def sql(schema: Schema, revision: str = "head") -> str:
    """The SQL of an upgrade, for a DBA to apply; needs no database.

    `revision` may be a range, "eo0001:head", for a database that already has the first.
    """
    config = _config(schema)
    _call(command.upgrade, config, revision, sql=True)
    assert isinstance(config.output_buffer, io.StringIO)
    return config.output_buffer.getvalue()


def _current(connection: Connection, schema: Schema) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE, schema=schema.name):
        return None
    _refuse_unreadable(connection, schema)
    context = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE, "version_table_schema": schema.name}
    )
    heads = context.get_current_heads()
    return heads[0] if heads else None


def _refuse_unreadable(connection: Connection, schema: Schema) -> None:
    table = f'"{schema.name}".{VERSION_TABLE}'
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
