"""For the env.py of a user's own alembic environment.

    # alembic.ini: our versions beside yours, joined by the branch label `eoframework`
    path_separator = newline
    version_locations =
        %(here)s/migrations/versions
        eoframework:migrations/versions

    # env.py: autogenerate leaves our tables alone
    context.configure(..., include_object=include_object)

`alembic upgrade heads` then upgrades both. Our tables go to EO_DATABASE_SCHEMA, whatever schema yours are in.
"""

from __future__ import annotations

from alembic import context

from eoframework.db import joined
from eoframework.db.grants import TABLES
from eoframework.schema import Schema
from eoframework.settings import Settings

_OUR_TABLES = frozenset({*TABLES, joined.COPY})


def include_object(item: object, name: str | None, type_: str, reflected: bool, compare_to: object | None) -> bool:
    """False for what is in the database because of eoframework: alembic's `include_object`.

    In a schema of our own that is everything the user's metadata does not name; in the connection's default schema,
    which the user's tables are in as well, our tables.
    """
    if type_ != "table" or not reflected or compare_to is not None:
        return True
    running = context.get_context()
    ours = Schema(Settings.load().database_schema).name
    default = running.dialect.default_schema_name or "public"
    if name == running.version_table:
        # Known to alembic as its own only where it looks for it. A role that is called like our schema has that as its
        # default schema from the moment it exists; the version table, made before, is in another one.
        return False
    schema = getattr(item, "schema", None)
    if schema is None and ours != default and name in _OUR_TABLES:
        # Seen by way of a search_path that has our schema behind theirs: not a table of theirs that the metadata lack,
        # which autogenerate would drop.
        assert running.connection is not None
        return joined.has(running.connection, default, name)
    if (schema or default) != ours:
        return True
    return ours == default and name not in _OUR_TABLES
