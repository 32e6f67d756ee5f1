"""Whether the database can be worked with: it answers, and we may do there what we have to."""

from __future__ import annotations

import logging
import re
import threading

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from eoframework import clock
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, Unreachable

_log = logging.getLogger(__name__)

# libpq gives no SQLSTATE for a refused connection, only the server's words. What is not known here is waited for and
# repeated in the log: a server whose messages are translated then costs patience, not correctness.
_REFUSED = re.compile(
    r"password authentication failed|no password supplied|no pg_hba\.conf entry|role \".*\" does not exist"
    r"|database \".*\" does not exist|is not permitted to log in|permission denied for database"
    r"|authentication failed for user|certificate verify failed|server does not support SSL|invalid connection option"
    r"|invalid URI|root certificate file .* does not exist|invalid sslmode",
    re.IGNORECASE,
)
_TELL_EVERY = 30.0

_MISSING_RIGHTS = """
SELECT c.relname, p.privilege FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace,
    unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) AS p(privilege)
WHERE n.nspname = :schema AND c.relkind IN ('r', 'p') AND c.relname <> 'alembic_version'
    AND has_schema_privilege(n.oid, 'USAGE') AND NOT has_table_privilege(c.oid, p.privilege)
UNION ALL
SELECT nspname, 'USAGE' FROM pg_namespace WHERE nspname = :schema AND NOT has_schema_privilege(oid, 'USAGE')
"""


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


def check_rights(database: Database) -> None:
    """Raise ConfigurationError if the role lacks a right on one of our tables; names the GRANT."""
    with database.begin("reading the role's rights") as connection:
        missing = list(connection.execute(text(_MISSING_RIGHTS), {"schema": database.schema.name}))
    if missing:
        names = ", ".join(f"{privilege} on {table}" for table, privilege in missing[:4])
        schema = database.schema.name
        raise ConfigurationError(
            f"the database role lacks rights on schema {schema!r}: {names}{' ...' if len(missing) > 4 else ''}.",
            remedy=f"As owner: GRANT USAGE ON SCHEMA {schema} TO role; "
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO role;",
        )


def where(database: Database) -> str:
    """The database as host:port/name, without user and password."""
    url = database.engine.url
    host = url.host or url.query.get("host") or "local socket"
    return f"{host}{f':{url.port}' if url.port else ''}/{url.database or ''}"


def _trouble(database: Database) -> str | None:
    """None if the database answers, else its words. Raises ConfigurationError if they mean that waiting is no use."""
    try:
        with database.engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        words = _words(error)
        if _REFUSED.search(words):
            raise ConfigurationError(
                f"PostgreSQL at {where(database)} refuses the login: {words}.",
                remedy="Correct EO_DATABASE_URL, or what it names.",
            ) from error
        return words
    return None


def _words(error: SQLAlchemyError) -> str:
    """The line of libpq's account that matters: it tries every address, a line or two for each."""
    lines = [line.strip() for line in str(getattr(error, "orig", None) or error).splitlines() if line.strip()]
    refusals = [line for line in lines if _REFUSED.search(line)]
    return (refusals or lines or [type(error).__name__])[0].removesuffix(":")
