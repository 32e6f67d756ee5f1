"""Whether the database can be worked with: it answers, and we may do there what we have to."""

from __future__ import annotations

import logging
import re
import shlex
import threading

import psycopg
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from eoframework import clock
from eoframework.db import grants
from eoframework.db.grants import Purpose
from eoframework.db.links import connected
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, Unreachable

_log = logging.getLogger(__name__)

# libpq gives no SQLSTATE for a refused connection, only the server's words. What is not known here is waited for and
# repeated in the log: a server whose messages are translated then costs patience, not correctness.
_REFUSED = re.compile(
    r"password authentication failed|no password supplied|no pg_hba\.conf entry|role \".*\" does not exist"
    r"|database \".*\" does not exist|is not permitted to log in|permission denied for database"
    r"|authentication failed for user|certificate verify failed|server does not support SSL|invalid connection option"
    r"|invalid URI|root certificate file .* does not exist|invalid sslmode"
    # PgBouncer's words.
    r"|unsupported startup parameter|no such database|no such user|SASL authentication failed"
    r"|not allowed in statement pooling mode",
    re.IGNORECASE,
)
_TELL_EVERY = 30.0


def wait_until_reachable(database: Database, *, stop: threading.Event | None = None, wait: bool = True) -> bool:
    """Return True once PostgreSQL answers, False when `stop` was set first.

    Waits for ever and says so; with `wait=False` raises Unreachable at the first failure. A refused login, or a
    database that does not exist, raises ConfigurationError at once: time does not mend a wrong password.
    """
    stop = stop or threading.Event()
    next_telling = 0.0
    while not stop.is_set():
        trouble = _trouble(database)
        if trouble is None:
            if next_telling:
                _log.info("PostgreSQL at %s answers again; going on.", where(database))
            return True
        if not wait:
            raise Unreachable(
                f"PostgreSQL at {where(database)} cannot be reached ({trouble}).",
                remedy="Start it, or correct EO_DATABASE_URL.",
            )
        if clock.monotonic() >= next_telling:
            _log.warning(
                "PostgreSQL at %s cannot be reached (%s); waiting for it. Nothing is lost.", where(database), trouble
            )
            next_telling = clock.monotonic() + _TELL_EVERY
        clock.wait(stop, clock.jitter(0.5, 1.5))
    return False


def check_rights(database: Database, purpose: Purpose = "app") -> None:
    """Raise ConfigurationError if the role lacks a right its purpose needs; names it, and what grants it."""
    with database.begin("reading the role's rights") as connection:
        role = connection.exec_driver_sql("SELECT current_user::text").scalar_one()
        lacking = grants.missing(connection, database.schema, purpose)
    if lacking:
        raise ConfigurationError(
            f"database role {role!r} lacks rights on schema {database.schema.name!r}: {', '.join(lacking[:4])}"
            f"{' ...' if len(lacking) > 4 else ''}.",
            remedy=f"As owner: eo db grants --{purpose} {shlex.quote(role)} --apply (without it, the SQL).",
        )


def where(database: Database) -> str:
    """The database as host:port/name, without user and password."""
    url = database.engine.url
    hosts = url.host or url.query.get("host") or "local socket"
    listed = hosts if isinstance(hosts, str) else ",".join(hosts)
    return f"{listed}{f':{url.port}' if url.port else ''}/{url.database or ''}"


def _trouble(database: Database) -> str | None:
    """None if the database answers, else its words. Raises ConfigurationError if they mean that waiting is no use."""
    try:
        with connected(database.engine) as connection:
            connection.execute(text("SELECT 1"))
    except (SQLAlchemyError, psycopg.Error) as error:
        words = _words(error)
        if _REFUSED.search(words):
            raise ConfigurationError(
                f"PostgreSQL at {where(database)} refuses the login: {words}.",
                remedy="Correct EO_DATABASE_URL, or what it names.",
            ) from error
        return words
    return None


def _words(error: SQLAlchemyError | psycopg.Error) -> str:
    """The line of libpq's account that matters: it tries every address, a line or two for each."""
    lines = [line.strip() for line in str(getattr(error, "orig", None) or error).splitlines() if line.strip()]
    refusals = [line for line in lines if _REFUSED.search(line)]
    return (refusals or lines or [type(error).__name__])[0].removesuffix(":")
