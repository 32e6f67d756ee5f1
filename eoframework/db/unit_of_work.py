"""The database transaction a batch runs in, and the guards that keep a handler from ending it.

A worker thread keeps one connection for itself: its backend is recorded in the position rows, so a successor can end
exactly that backend if it stands in the way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from psycopg.pq import TransactionStatus
from sqlalchemy import Connection, RootTransaction, event
from sqlalchemy.orm import Session, sessionmaker

from eoframework import events
from eoframework.db.faults import classified
from eoframework.db.links import check_confirmed, examine, link_of
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, FailClosed, HandlerMisuse, LostConnection

# Timeouts are SET LOCAL, so that a pooler in transaction mode carries them. synchronous_commit is only ever raised:
# with it off a crash of the server takes back effects whose offset the group already counts as done.
_SETTINGS = """
SELECT set_config('statement_timeout', %(statement)s, true), set_config('lock_timeout', %(lock)s, true),
    set_config('idle_in_transaction_session_timeout', %(idle)s, true), set_config('synchronous_commit',
        CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on'
             ELSE current_setting('synchronous_commit') END, true)
"""
# Behind a pooler the session says nothing of whose transaction it is: a successor finds the one it has to end by this.
_NAMED = f"{_SETTINGS.rstrip()}, set_config('application_name', %(session)s, true)\n"
_GAP = r"(?:\s|;|--[^\n]*|/\*.*?\*/)*"
_END = r"(?:commit|abort|rollback(?!\s+(?:work\s+|transaction\s+)?to\b)|prepare\s+transaction"
_ENDS_TRANSACTION = re.compile(rf"{_GAP}{_END}|end|begin|start)\b", re.I | re.S)
# Statements sent without parameters may be several in one text. END and BEGIN are words of function bodies too.
_ENDS_TRANSACTION_LATER = re.compile(rf";{_GAP}{_END})\b", re.I | re.S)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; idle < lock < max_poll_interval, so a successor waits for a frozen owner and not the reverse."""

    statement: float
    lock: float
    idle: float

    def values(self) -> dict[str, str]:
        return {name: str(int(getattr(self, name) * 1000)) for name in ("statement", "lock", "idle")}


class WorkerConnection:
    """The one connection of a worker thread; opened when needed, thrown away after any doubt."""

    def __init__(self, database: Database, timeouts: Timeouts, *, handler: str, session: str | None = None) -> None:
        """`session` names its transactions where a pooler stands between."""
        self._database = database
        self._settings = {**timeouts.values(), "session": session}
        self._handler = handler
        self.on_open: Callable[[], None] = lambda: None
        """Called after a new connection was opened: whatever names the old one is out of date."""
        self._connection: Connection | None = None
        self._committing = self._rolled_back = False

    @contextmanager
    def begin(self, what: str, *, opening: bool = True) -> Iterator[Connection]:
        """One transaction with our timeouts; commits at the end, rolls back on any error, errors leave classified.

        With `opening=False` a connection that is gone is not replaced: the claims name its backend, and a batch on
        another one could not be ended by a successor.
        On a lost connection: LostConnection, also when it broke during COMMIT. Whether that COMMIT happened is never
        concluded from the error (it is the same in both cases); claim again and read.
        """
        with classified(what):
            if not opening and self.status() is None:
                raise LostConnection(f"{what}: the connection to PostgreSQL is gone.")
            connection = self._open()
            self._rolled_back = False
            transaction = connection.begin()
            try:
                named = self._settings["session"] is not None and link_of(connection).pooled
                connection.exec_driver_sql(_NAMED if named else _SETTINGS, self._settings)
                yield connection
                self._commit(transaction, what)
            except BaseException:
                self._roll_back(transaction)
                raise

    def discard(self) -> None:
        """Close the connection for good; the next `begin` opens a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            type(connection).close(connection)

    def _open(self) -> Connection:
        if self._connection is None or self._connection.invalidated:
            self.discard()
            connection = self._database.engine.connect()
            if _driver(connection).autocommit:  # get_isolation_level() asks the server, which does not know
                connection.close()
                raise ConfigurationError(
                    "the engine's isolation level is AUTOCOMMIT: a handler's effects would not be one transaction.",
                    remedy="Give App an engine without isolation_level='AUTOCOMMIT'.",
                )
            try:
                examine(connection)
            except BaseException:
                connection.close()
                raise
            setattr(connection, "close", _forbidden(self._handler, "connection().close"))  # noqa: B010 - mypy
            event.listen(connection, "commit", self._guard_commit)
            event.listen(connection, "rollback", self._note_rollback)
            event.listen(connection, "before_cursor_execute", self._guard_statement)
            self._connection = connection
            self.on_open()
        return self._connection

    def _commit(self, transaction: RootTransaction, what: str) -> None:
        if not transaction.is_active:
            raise HandlerMisuse(f"{self._handler} ended the database transaction.", remedy=_LEAVE_IT)
        self._committing = True
        try:
            events.emit("db.committing")
            transaction.commit()
        finally:
            self._committing = False
        check_confirmed(transaction.connection, what)
        events.emit("db.committed")

    def _roll_back(self, transaction: RootTransaction) -> None:
        """End the transaction whatever state it is in; a connection that cannot even roll back is thrown away."""
        try:
            transaction.close()
            if self._connection is not None and self.status() in _OPEN:
                _driver(self._connection).rollback()  # SQLAlchemy thinks it is over: a handler tried to end it
        except Exception:  # noqa: BLE001 - the first error is the one to tell; the server rolls back a closed session
            self.discard()
        if self.status() is not TransactionStatus.IDLE:
            self.discard()

    def status(self) -> TransactionStatus | None:
        """What the server says about our transaction, asked from the driver, never shadowed."""
        if self._connection is None or self._connection.invalidated or self._connection.closed:
            return None
        status = TransactionStatus(_driver(self._connection).info.transaction_status)
        return None if status is TransactionStatus.UNKNOWN else status

    def check_intact(self) -> None:
        """Fail if a statement failed and the handler went on: PostgreSQL would make our COMMIT a silent ROLLBACK."""
        status = self.status()
        if status is TransactionStatus.INTRANS:
            return
        if status is None:
            raise LostConnection(f"{self._handler}: the connection to PostgreSQL was lost inside the handler.")
        if status is TransactionStatus.IDLE and not self._rolled_back:
            raise FailClosed(
                f"{self._handler} ended the database transaction past every guard. If it committed, the positions of "
                "its batch are stored, and the messages after the one being handled were not processed.",
                remedy="Compare `eo position show`; to process them: eo position set. " + _LEAVE_IT,
            )
        raise HandlerMisuse(
            f"{self._handler} caught a database error and went on: its transaction is already lost ({status.name}).",
            remedy="Let the error out, or put the statement that may fail into `with tx.session.begin_nested():`.",
        )

    def _guard_commit(self, _connection: Connection) -> None:
        if not self._committing:
            raise HandlerMisuse(f"{self._handler} committed the database transaction.", remedy=_LEAVE_IT)

    def _note_rollback(self, _connection: Connection) -> None:
        # Not refused: a failed flush rolls back by itself, and refusing would hide its error.
        self._rolled_back = True

    def _guard_statement(self, _c: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if _ENDS_TRANSACTION.match(statement) or (";" in statement and _ENDS_TRANSACTION_LATER.search(statement)):
            raise HandlerMisuse(f"{self._handler} executed {statement.strip()[:40]!r}.", remedy=_LEAVE_IT)


@contextmanager
def handler_session(factory: sessionmaker[Session], connection: Connection, *, handler: str) -> Iterator[Session]:
    """A Session that writes into our transaction and cannot end it; flushed (with its own hooks) at the end.

    Whatever the factory would route elsewhere comes here: an effect on another connection would not be ours to commit.
    """
    session = factory(bind=connection, twophase=False, join_transaction_mode="rollback_only")
    setattr(session, "get_bind", lambda *_, **__: connection)  # noqa: B010 - mypy
    for name in ("commit", "rollback", "close", "reset"):
        setattr(session, name, _forbidden(handler, name))
    try:
        session.begin()
        yield session
        # The class's own commit: flushes and runs the user's before_commit hooks; in this join mode the outer
        # transaction stays open.
        type(session).commit(session)
    finally:
        type(session).close(session)


def _forbidden(handler: str, method: str) -> Callable[..., NoReturn]:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise HandlerMisuse(f"{handler} called tx.session.{method}().", remedy=_LEAVE_IT)

    return refuse


def _driver(connection: Connection) -> Any:
    return connection.connection.dbapi_connection


_OPEN = frozenset({TransactionStatus.INTRANS, TransactionStatus.INERROR})
_LEAVE_IT = (
    "A handler's effects, its processed message and its position are committed together after it returns; "
    "leave the transaction alone, or use `with tx.session.begin_nested():` for a part that may be undone."
)
