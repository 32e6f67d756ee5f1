"""Whether a PostgreSQL server answers, and the making of a database on it."""

from __future__ import annotations

import psycopg
from psycopg import sql

from eoframework.errors import Unreachable


def select_one(conninfo: str) -> None:
    """Ask the server `select 1`. Raises Unreachable with its reason, within about two seconds."""
    try:
        with psycopg.connect(conninfo, connect_timeout=2) as connection:
            connection.execute("select 1")
    except psycopg.OperationalError as error:
        raise Unreachable(
            f"PostgreSQL does not answer: {str(error).strip()}.", remedy="Look at the server's log."
        ) from error


def ensure_database(conninfo: str, name: str) -> None:
    """The database `name` exists on the server. Raises Unreachable."""
    try:
        with psycopg.connect(conninfo, connect_timeout=2, autocommit=True) as connection:
            if connection.execute("select 1 from pg_database where datname = %s", [name]).fetchone() is None:
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    except psycopg.OperationalError as error:
        raise Unreachable(
            f"PostgreSQL does not let us create the database {name}: {str(error).strip()}.",
            remedy="Look at the server's log.",
        ) from error
