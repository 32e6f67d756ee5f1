"""Database errors, classified once, by what the caller must do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from sqlalchemy import exc

from eoframework.errors import (
    Conflict,
    EoError,
    FailClosed,
    IdledTooLong,
    LostConnection,
    Permanent,
    Retryable,
    SchemaOutOfDate,
    TimedOut,
)

# Class 08 and the shutdown codes of class 57: the server went away; 25P03/25P04/57P05: it ended our session. 25006: it
# has become read-only, a standby that we are still connected to.
_LOST = frozenset({"57P01", "57P02", "57P03", "25P04", "57P05", "25006"})
_IDLE_TOO_LONG = "25P03"
# Serialization failure, deadlock, lock not available, and out of shared lock table: rolled back by the server, a
# smaller run will pass.
_CONFLICT = frozenset({"40001", "40P01", "55P03", "53200"})
_STATEMENT_TIMEOUT = "57014"
_RETRYABLE_CLASSES = ("53",)  # insufficient resources: disk full, too many connections


@contextmanager
def classified(what: str) -> Iterator[None]:
    """Run database work; any error of the driver leaves as Retryable, LostConnection, Conflict or Permanent.

    `what` names the work for the message. Errors of other libraries and of the user's code pass through unchanged.
    """
    try:
        yield
    except (exc.SQLAlchemyError, psycopg.Error) as error:
        raise classify(error, what) from error


@contextmanager
def blameless(what: str) -> Iterator[None]:
    """Run statements of ours that come before a handler's: no message is to blame for what they meet."""
    try:
        yield
    except (exc.SQLAlchemyError, psycopg.Error) as error:
        known = classify(error, what)
        if isinstance(known, Permanent):
            raise FailClosed(known.what, remedy="No message was run. Is the database what it was?") from error
        raise known from error


def classify(error: Exception, what: str) -> EoError:
    """The error of our tree that says what to do about a database error."""
    sqlstate = sqlstate_of(error)
    detail = _first_line(error)
    if isinstance(error, exc.TimeoutError):
        return Retryable(f"{what}: no connection of the engine's pool became free ({detail}).")
    if sqlstate is None:
        if _connection_is_gone(error):
            return LostConnection(f"{what}: the connection to PostgreSQL was lost ({detail}).")
        return Permanent(f"{what}: {detail}")
    if sqlstate == _IDLE_TOO_LONG:
        return IdledTooLong(
            f"{what}: PostgreSQL ended the transaction because nothing was done in it for too long.",
            remedy="A handler may not wait longer than EO_IDLE_IN_TRANSACTION_TIMEOUT between two statements.",
        )
    if sqlstate in _LOST or sqlstate.startswith("08"):
        return LostConnection(f"{what}: PostgreSQL ended the connection ({sqlstate}: {detail}).")
    if sqlstate in _CONFLICT:
        return Conflict(f"{what}: rolled back by PostgreSQL ({sqlstate}: {detail}).")
    if sqlstate == _STATEMENT_TIMEOUT:
        return TimedOut(
            f"{what}: PostgreSQL ended a statement that took too long ({detail}).",
            remedy="No statement may take longer than EO_STATEMENT_TIMEOUT.",
        )
    if sqlstate.startswith(_RETRYABLE_CLASSES):
        return Retryable(f"{what}: PostgreSQL could not do it now ({sqlstate}: {detail}).")
    if sqlstate in {"3F000", "42P01"} and '"eo' in detail:
        return SchemaOutOfDate(f"{what}: {detail}.", remedy="Run: eo db upgrade")
    return Permanent(f"{what}: {sqlstate}: {detail}")


def passing_trouble(error: Exception, what: str) -> Retryable | None:
    """An error that came out of a handler, if it is the database's passing trouble; None if it is the message's fault.

    Its class is kept: a lost connection and a conflict ask for different things.
    """
    if isinstance(error, (exc.SQLAlchemyError, psycopg.Error)):
        error = classify(error, what)
    return error if isinstance(error, Retryable) else None


def sqlstate_of(error: BaseException) -> str | None:
    """The five-character SQLSTATE, None when the server gave none (a lost connection gives none)."""
    origin = getattr(error, "orig", None) or error
    state = getattr(origin, "sqlstate", None)
    return state if isinstance(state, str) else None


def _connection_is_gone(error: Exception) -> bool:
    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return True
    origin = getattr(error, "orig", None) or error
    # psycopg raises OperationalError without a SQLSTATE only for the connection itself (refused, reset, closed).
    return isinstance(origin, psycopg.OperationalError)


def _first_line(error: Exception) -> str:
    origin = getattr(error, "orig", None) or error
    return str(origin).strip().split("\n", 1)[0]
