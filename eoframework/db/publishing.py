"""Publishing into a transaction of the user's own: kept until it ends, written immediately before its COMMIT.

    publish -> kept for the Connection, or for the AsyncSession -> savepoints and rollbacks take theirs away
            -> the engine's `commit` event: key locks, insert -> COMMIT

Written at the end so that a key's lock spans the COMMIT only: two writers of one key would otherwise run one after the
other for as long as their transactions last. The engine's `commit` event is the one moment that is the end: a Session's
`before_commit` fires before its last flush (a deadlock between the locks and the rows it then locks), at the release of
a savepoint, and for a Session joined to an outer transaction (the lock would be held on).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, TwoPhaseTransaction, event, exc
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, SessionTransaction, scoped_session
from sqlalchemy.util.concurrency import in_greenlet

from eoframework import events
from eoframework.db.links import examine_inside
from eoframework.db.outbox import Outbox
from eoframework.db.savepoints import SessionBuffer, next_place
from eoframework.errors import ConfigurationError
from eoframework.message import OutboxMessage

PublishTarget = (
    Session | AsyncSession | Connection | AsyncConnection | scoped_session[Session] | async_scoped_session[AsyncSession]
)

_INFO = "eoframework.published"


@dataclass(slots=True)
class _Kept:
    outbox: Outbox
    message: OutboxMessage
    savepoint: int
    place: int


@dataclass(slots=True)
class _Buffer:
    """What was published on one Connection in its current transaction."""

    kept: list[_Kept] = field(default_factory=list)
    sessions: list[_AsyncBuffer] = field(default_factory=list)
    written: bool = False


_buffers: WeakKeyDictionary[Connection, _Buffer] = WeakKeyDictionary()


def session_of(target: PublishTarget) -> Session | None:
    """The Session behind a target; None for a bare connection."""
    if isinstance(target, (scoped_session, async_scoped_session)):
        target = target()
    if isinstance(target, AsyncSession):
        return target.sync_session
    return target if isinstance(target, Session) else None


def publish(target: PublishTarget, outbox: Outbox, message: OutboxMessage) -> None:
    """Write `message` to the outbox if and when the outermost transaction of `target` commits.

    On a crash: it exists if and only if that transaction was committed. A savepoint that is rolled back takes along
    what was published inside. Raises ConfigurationError for an AUTOCOMMIT connection and for two-phase commit.
    """
    if isinstance(target, (scoped_session, async_scoped_session)):
        target = target()
    if isinstance(target, AsyncSession) and in_greenlet():
        # From one of its Session's hooks, which may run during the commit: SQL may run here, and nobody may come later.
        target = target.sync_session
    if isinstance(target, AsyncSession):
        _async_buffer(target.sync_session).publish(outbox, message)
    elif isinstance(target, Session):
        _keep(_connection_of(target), outbox, message)
    elif isinstance(target, AsyncConnection):
        _keep(_started(target), outbox, message)
    elif isinstance(target, Connection):
        _keep(target, outbox, message)
    else:
        raise ConfigurationError(
            f"publish into a {type(target).__name__}.",
            remedy="Give a SQLAlchemy Session, AsyncSession, Connection or AsyncConnection.",
        )


# --- connections ---


def _keep(connection: Connection, outbox: Outbox, message: OutboxMessage) -> None:
    _listen(connection)
    if not connection.in_transaction():
        # Without it a `connection.commit()` has nothing to commit and fires no event: the message would be gone.
        connection.begin()
    _check_transaction(connection)
    buffer = _buffers.setdefault(connection, _Buffer())
    if buffer.written:
        # A `commit` listener of the user's own, called after ours: nobody would write this message later.
        outbox.insert(connection, [message])
        return
    buffer.kept.append(_Kept(outbox, message, _innermost_savepoint(connection), next_place()))


def _check_transaction(connection: Connection) -> None:
    driver: Any = connection.connection.dbapi_connection
    if driver.autocommit:
        raise ConfigurationError(
            "publish on a connection in AUTOCOMMIT: there is no transaction the message could be part of.",
            remedy="Use a connection with another isolation level.",
        )
    if isinstance(connection.get_transaction(), TwoPhaseTransaction):
        raise _two_phase()


def _two_phase() -> ConfigurationError:
    return ConfigurationError(
        "publish in a two-phase transaction: the key locks would be held from PREPARE until somebody commits it.",
        remedy="Publish in a transaction of its own engine, without twophase=True or begin_twophase().",
    )


def _listen(connection: Connection) -> None:
    engine = connection.engine
    if not event.contains(engine, "commit", _on_commit):
        for name, listener in _LISTENERS.items():
            event.listen(engine, name, listener)


def _on_begin(connection: Connection) -> None:
    # What the last transaction left behind was rolled back, however it ended.
    _buffers.pop(connection, None)


def _on_rollback_savepoint(connection: Connection, name: str, _context: object) -> None:
    buffer = _buffers.get(connection)
    if buffer is not None:
        number = _savepoint_number(name)
        buffer.kept = [kept for kept in buffer.kept if kept.savepoint < number]


def _on_commit(connection: Connection) -> None:
    """Write everything that was published in this transaction; if that fails the transaction is rolled back."""
    buffer = _buffers.get(connection)
    if buffer is None or buffer.written:
        return
    try:
        for session in buffer.sessions:
            buffer.kept += session.hand_over()
        buffer.written = True
        _write(connection, sorted(buffer.kept, key=lambda kept: kept.place))
        events.emit("publish.committing", messages=len(buffer.kept))
    except BaseException:
        # SQLAlchemy takes the transaction for ended after a failed commit, and sends no ROLLBACK any more: the next
        # COMMIT on this connection would make the effects durable without their messages. A connection that is lost has
        # taken its transaction with it; to ask for it would hide what happened behind another error.
        if not connection.invalidated:
            connection.dialect.do_rollback(connection.connection)
        raise


def _write(connection: Connection, kept: list[_Kept]) -> None:
    if kept:
        examine_inside(connection)
    by_outbox: dict[Outbox, list[OutboxMessage]] = {}
    for one in kept:
        by_outbox.setdefault(one.outbox, []).append(one.message)
    for outbox, messages in by_outbox.items():
        outbox.insert(connection, messages)


_LISTENERS: dict[str, Callable[..., None]] = {
    "begin": _on_begin,
    "commit": _on_commit,
    "rollback_savepoint": _on_rollback_savepoint,
}


def _innermost_savepoint(connection: Connection) -> int:
    """The number of the savepoint we are in, 0 outside of any; a later savepoint has a higher number.

    So a rollback to savepoint n takes exactly the messages with a number of n or more. SQLAlchemy tells a savepoint's
    name only when it ends (the `savepoint` event comes before the name is made), hence the look at its own attribute.
    """
    savepoint = connection.get_nested_transaction()
    return 0 if savepoint is None else _savepoint_number(savepoint._savepoint)


def _savepoint_number(name: str) -> int:
    found = re.search(r"\d+$", name)
    assert found is not None, f"SQLAlchemy names savepoints by number, not {name!r}"
    return int(found[0])


def _started(target: AsyncConnection) -> Connection:
    if target.sync_connection is None:
        raise ConfigurationError(
            "publish on an AsyncConnection that is not connected.",
            remedy="Use `async with engine.begin() as connection:`.",
        )
    return target.sync_connection


def _connection_of(session: Session) -> Connection:
    try:
        if not session.in_transaction():
            _begin(session)
        return session.connection()
    except exc.UnboundExecutionError as error:
        raise ConfigurationError(
            "publish into a Session that has no single engine.",
            remedy="Name the one with eoframework's tables: "
            "app.publish(session.connection(bind_arguments={'mapper': ...}), ...).",
        ) from error


# --- AsyncSession: publish is no coroutine, so it cannot ask for a connection ---


class _AsyncBuffer:
    """What was published in one AsyncSession, until its Session commits and there is a Connection to keep it for.

    `publish` is not a coroutine on purpose: a forgotten `await` would lose the message without a sound.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._buffer = SessionBuffer(session)
        self._outboxes: dict[int, Outbox] = {}
        self._connection: Connection | None = None
        event.listen(session, "before_commit", self._before_commit)
        event.listen(session, "after_commit", self._after_commit)
        event.listen(session, "after_rollback", self._after_rollback)
        event.listen(session, "after_transaction_end", self._after_transaction_end)

    def publish(self, outbox: Outbox, message: OutboxMessage) -> None:
        session = self._session
        if session.twophase:
            raise _two_phase()
        if not session.in_transaction():
            _begin(session)
        outer = _joined_to(session)
        if outer is not None:
            self._attach(outer)
        self._outboxes[self._buffer.add(message)] = outbox

    def hand_over(self) -> list[_Kept]:
        """Everything not rolled back so far, outside of any savepoint."""
        return [_Kept(self._outboxes.pop(p.place), p.message, 0, p.place) for p in self._buffer.take()]

    def _attach(self, connection: Connection) -> None:
        """Be asked for the messages when `connection` commits."""
        _listen(connection)
        _check_transaction(connection)
        buffer = _buffers.setdefault(connection, _Buffer())
        if self not in buffer.sessions:
            buffer.sessions.append(self)

    def _hand_on(self, connection: Connection) -> None:
        """The Session is done, `connection` is not: what was published now depends on that alone."""
        number = _innermost_savepoint(connection)
        buffer = _buffers.setdefault(connection, _Buffer())
        for kept in self.hand_over():
            kept.savepoint = number
            buffer.kept.append(kept)

    def _before_commit(self, session: Session) -> None:
        if len(self._buffer):
            self._connection = _connection_of(session)
            self._attach(self._connection)

    def _after_commit(self, session: Session) -> None:
        if session.get_nested_transaction() is None and len(self._buffer):
            # Nothing was committed, or the connection would have taken them: joined to an outer transaction.
            assert self._connection is not None, "set by _before_commit, which finds the same messages"
            self._hand_on(self._connection)

    def _after_rollback(self, session: Session) -> None:
        if session.get_nested_transaction() is None:
            self._buffer.drop()

    def _after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            outer = _joined_to(session)
            if len(self._buffer) and outer is not None and not _closing_undoes(session, outer):
                self._hand_on(outer)
            self._connection = None
            self._buffer.drop()
            self._outboxes.clear()


def _joined_to(session: Session) -> Connection | None:
    """The Connection whose transaction the Session takes part in."""
    bind = session.bind
    return bind if isinstance(bind, Connection) and bind.in_transaction() else None


def _closing_undoes(session: Session, outer: Connection) -> bool:
    """Whether closing a joined Session without a commit takes back its effects, and so its messages."""
    mode = session.join_transaction_mode
    return mode != "rollback_only" and (mode != "conditional_savepoint" or outer.in_nested_transaction())


def _begin(session: Session) -> None:
    if not session.autobegin:
        raise ConfigurationError(
            "publish into a Session that has not begun its transaction and does not do so by itself.",
            remedy="Publish inside `with session.begin():`.",
        )
    session.begin()


def _async_buffer(session: Session) -> _AsyncBuffer:
    buffer = session.info.get(_INFO)
    if not isinstance(buffer, _AsyncBuffer):
        buffer = session.info[_INFO] = _AsyncBuffer(session)
    return buffer
