"""What has to be known of every connection before its first use: whether a pooler stands between, and what it drops.

A pooler in transaction mode (PgBouncer) gives each transaction whichever session of the server is free. So nothing may
be kept in a session: statements are not prepared, settings are SET LOCAL, and who holds a row is told by a name that
the transaction itself carries, no longer by the session it runs in.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, event

from eoframework.errors import ConfigurationError, LostConnection

_KEY = "eoframework.link"
_WAIT_FOR_STANDBY = "SyncRepWaitForLSN"

_Ask = Callable[..., object]


@dataclass(slots=True)
class Link:
    """One connection of the driver, from its opening to its end."""

    pooled: bool
    """A pooler stands between: the session changes from one transaction to the next."""
    unconfirmed: bool = False
    """A COMMIT came back before the synchronous standby had it."""


def watch(engine: Engine) -> None:
    """Examine every connection of a new engine as it is opened, whoever uses it then.

    Only of an engine that nobody uses yet: a listener that is added while another thread checks a connection out breaks
    that thread's iteration over the listeners.
    """
    event.listen(engine, "connect", _on_connect)


@contextmanager
def connected(engine: Engine) -> Iterator[Connection]:
    """A connection that is examined."""
    with engine.connect() as connection:
        examine(connection)
        yield connection


def examine(connection: Connection) -> None:
    """Find out what stands between, once for each connection; outside of a transaction.

    Raises ConfigurationError when the pooler drops what the URL asks for.
    """
    known = connection.info.get(_KEY)
    if known is not None:
        known.unconfirmed = False  # of a COMMIT of the user's own, which was theirs to doubt
        return
    driver = connection.connection.dbapi_connection
    connection.info[_KEY] = _examined(driver, lambda statement, *values: _scalar(connection, statement, values))
    connection.rollback()


def examine_inside(connection: Connection) -> None:
    """The same inside a transaction of the user's, who looks after the URL's options."""
    if _KEY not in connection.info:
        driver = connection.connection.dbapi_connection
        link = _looked_at(driver, lambda statement, *values: _scalar(connection, statement, values))
        connection.info[_KEY] = link


def link_of(connection: Connection) -> Link:
    """What is known of this connection."""
    found = connection.info.get(_KEY)
    return found if isinstance(found, Link) else Link(pooled=False)


def check_confirmed(connection: Connection, what: str) -> None:
    """Raise LostConnection if the last COMMIT returned success without the synchronous standby; after each COMMIT.

    An operator who cancels a COMMIT that hangs on its standby (pg_cancel_backend, Ctrl-C) makes it return success with
    a warning. A failover would take back what the client counts as done; so it is in doubt, and whoever reads again
    does it in a transaction that writes, whose own COMMIT waits for the standby.
    Source: PostgreSQL, src/backend/replication/syncrep.c
    """
    if link_of(connection).unconfirmed:
        connection.invalidate()
        raise LostConnection(
            f"{what}: its COMMIT did not wait for the synchronous standby, somebody cancelled that. A failover could "
            "still take it back, so it counts as in doubt."
        )


def _on_connect(driver: Any, record: Any) -> None:
    def ask(statement: str, *values: str) -> object:
        cursor = driver.cursor()
        cursor.execute(statement, values)
        (found,) = cursor.fetchone()
        cursor.close()
        return found

    record.info[_KEY] = _examined(driver, ask)
    driver.rollback()


def _scalar(connection: Connection, statement: str, values: tuple[str, ...]) -> object:
    return connection.exec_driver_sql(statement, values or None).scalar_one()


def _examined(driver: Any, ask: _Ask) -> Link:
    link = _looked_at(driver, ask)
    if link.pooled:
        _refuse_dropped_options(_psycopg(driver), ask)
    return link


def _looked_at(driver: Any, ask: _Ask) -> Link:
    connection = _psycopg(driver)
    if connection is None:
        return Link(pooled=False)  # another driver of the user's, to publish with
    # A pooler invents the number that names a session for cancelling; only without one it is the server process's.
    link = Link(pooled=connection.info.backend_pid != ask("SELECT pg_backend_pid()"))
    if link.pooled:
        # Prepared in one session, executed in another: "prepared statement does not exist", or the wrong one. Poolers
        # that keep track of them (PgBouncer 1.21) cannot be told from those that do not.
        connection.prepare_threshold = None
    connection.add_notice_handler(lambda notice: _note(link, notice))
    return link


def _psycopg(driver: Any) -> psycopg.Connection[Any] | psycopg.AsyncConnection[Any] | None:
    # An asynchronous one comes in SQLAlchemy's wrapping, which makes its cursors synchronous.
    connection = getattr(driver, "driver_connection", driver)
    return connection if isinstance(connection, psycopg.Connection | psycopg.AsyncConnection) else None


def _note(link: Link, notice: psycopg.errors.Diagnostic) -> None:
    # By the function that said it: the message is translated, and its SQLSTATE is that of any warning.
    if notice.source_function == _WAIT_FOR_STANDBY:
        link.unconfirmed = True


def _refuse_dropped_options(
    connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any] | None, ask: _Ask
) -> None:
    """Stop where `options=-c name=value` of the URL did not get through: told to ignore it, a pooler says nothing."""
    for name, wanted in _options(connection.info.options if connection is not None else ""):
        found = ask("SELECT current_setting(%s, true)", name)
        # As PostgreSQL writes it: 5000 and 5s are the same timeout.
        if found != ask("SELECT set_config(%s, %s, true)", name, wanted):
            raise ConfigurationError(
                f"the pooler before PostgreSQL drops the URL's options: {name} is {found!r}, not {wanted!r}.",
                remedy=f"Say it on the server: ALTER ROLE ... SET {name} = ...; and take `options` out of the URL.",
            )


def _options(text: str) -> Iterator[tuple[str, str]]:
    """The settings in libpq's `options`: -c name=value, -cname=value or --name=value."""
    words = iter(shlex.split(text))
    for word in words:
        setting = next(words, "") if word == "-c" else word[2:]
        name, equals, value = setting.partition("=")
        if equals:
            yield name.replace("-", "_"), value
