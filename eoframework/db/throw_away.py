"""The mark that says a database is there to be broken: crash tests run nowhere else."""

from __future__ import annotations

from eoframework.db.session import Database

MARK = "eo crashtest: throw-away"
# On the database itself and not in a table: a copy made for staging, by a template or from a backup of the tables, does
# not carry it along.
_READ = "SELECT shobj_description(oid, 'pg_database'), datname FROM pg_database WHERE datname = current_database()"


def is_throw_away(database: Database) -> bool:
    """Whether somebody has said of this database that nothing in it is needed. Raises LostConnection."""
    with database.begin("reading whether the database is a throw-away") as connection:
        return bool(connection.exec_driver_sql(_READ).one()[0] == MARK)


def mark_throw_away(database: Database) -> None:
    """Say so, as the database's owner. On a crash: said or not. Raises Permanent when the role may not."""
    with database.begin("marking the database as a throw-away") as connection:
        connection.exec_driver_sql(statement(connection.exec_driver_sql(_READ).one()[1]))


def statement(name: str) -> str:
    """What a person would type."""
    quoted = name.replace('"', '""')
    return f"COMMENT ON DATABASE \"{quoted}\" IS '{MARK}'"
