"""What has to be known of every connection before its first use: whether a pooler stands between, and what it drops.

A pooler in transaction mode (PgBouncer) gives each transaction whichever session of the server is free. So nothing may
be kept in a session: statements are not prepared, settings are SET LOCAL, and who holds a row is told by a name that
the transaction itself carries, no longer by the session it runs in.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy import Connection, Engine, event

from eoframework.errors import ConfigurationError, LostConnection

_KEY = "eoframework.link"
_WAIT_FOR_STANDBY = "SyncRepWaitForLSN"


@dataclass(slots=True)
class Link:
    """One connection of the driver, from its opening to its end."""

    pooled: bool
    """A pooler stands between: the session changes from one transaction to the next."""
    unconfirmed: bool = False
    """A COMMIT came back before the synchronous standby had it."""


def watch(engine: Engine) -> None:
    """Examine every connection of the engine once, also those that were opened before; may be said again."""
    if not event.contains(engine, "checkout", _examine):
        event.listen(engine, "checkout", _examine)


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


def _examine(driver: Any, record: Any, _proxy: object) -> None:
    # In the record's info, which ends with the connection: an engine may have had some before it was watched.
    known = record.info.get(_KEY)
    if known is not None:
        known.unconfirmed = False  # of a COMMIT of the user's own, which was theirs to doubt
    else:
        record.info[_KEY] = _examined(driver)


def _examined(driver: Any) -> Link:
    # An asynchronous one comes in SQLAlchemy's wrapping, which makes its cursors synchronous.
    connection = getattr(driver, "driver_connection", driver)
    if not isinstance(connection, psycopg.Connection | psycopg.AsyncConnection):
        return Link(pooled=False)  # another driver of the user's, to publish with
    # A pooler invents the number that names a session for cancelling; only without one it is the server process's.
    link = Link(pooled=connection.info.backend_pid != int(_ask(driver, "SELECT pg_backend_pid()")))
    if link.pooled:
        # Prepared in one session, executed in another: "prepared statement does not exist", or the wrong one. Poolers
        # that keep track of them (PgBouncer 1.21) cannot be told from those that do not.
        connection.prepare_threshold = None
        _refuse_dropped_options(driver, connection.info.options)
    connection.add_notice_handler(lambda notice: _note(link, notice))
    driver.rollback()
    return link


def _ask(driver: Any, statement: str, *values: str) -> str:
    cursor = driver.cursor()
    cursor.execute(statement, values)
    (found,) = cursor.fetchone()
    cursor.close()
    return str(found)


def _note(link: Link, notice: psycopg.errors.Diagnostic) -> None:
    # By the function that said it: the message is translated, and its SQLSTATE is that of any warning.
    if notice.source_function == _WAIT_FOR_STANDBY:
        link.unconfirmed = True


def _refuse_dropped_options(driver: Any, options: str) -> None:
    """Stop where `options=-c name=value` of the URL did not get through: told to ignore it, a pooler says nothing."""
    for name, wanted in _options(options):
        found = _ask(driver, "SELECT current_setting(%s, true)", name)
        # As PostgreSQL writes it: 5000 and 5s are the same timeout.
        if found != _ask(driver, "SELECT set_config(%s, %s, true)", name, wanted):
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
