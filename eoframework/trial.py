"""Running a handler on one stored message without committing anything, to see what it would do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from eoframework.app import App
from eoframework.consume.external import ExternalCalls
from eoframework.db.faults import passing_trouble
from eoframework.db.position import Stream
from eoframework.db.session import Connection, Database
from eoframework.db.trial_rows import RowChange, RowWatch, TableChanges
from eoframework.db.unit_of_work import Timeouts, WorkerConnection, handler_session
from eoframework.errors import Conflict, DecodeError, Permanent
from eoframework.external import Results
from eoframework.failures import Cause, cause_of
from eoframework.handlers import Handler
from eoframework.message import Message, OutboxMessage, Record, Source
from eoframework.tx import Tx

__all__ = ["RowChange", "TableChanges", "Trial", "decode", "run"]

ROWS = 50
_RUNS = 3


@dataclass(frozen=True, slots=True)
class Trial:
    """What the handler would do: all of this was rolled back."""

    error: Cause | None
    """Why it fails, or could not be run; then there are no changes."""
    tables: tuple[TableChanges, ...] = ()
    published: tuple[OutboxMessage, ...] = ()


class ResultMissing(Permanent):
    """The handler was not run: a result that it would ask for is not stored."""


class _RolledBack(Exception):
    """Carries the result out of the transaction, which an exception rolls back."""

    def __init__(self, trial: Trial) -> None:
        super().__init__()
        self.trial = trial


def decode(handler: Handler, record: Record) -> Message[object]:
    """The message in a stored record, for the handler's topic as it is now. Raises DecodeError."""
    if record.unreadable:
        raise DecodeError(f"{record}: {record.unreadable}.")
    try:
        return handler.topic.decode(record)
    except DecodeError:
        raise
    except Exception as error:  # a codec is anybody's code
        raise DecodeError(f"{record}: {type(error).__name__}: {error}.") from error


def run(app: App, handler: Handler, stream: Stream, record: Record, *, rows: int = ROWS) -> Trial:
    """Call the handler for the record and roll back; `rows`: how many changes of each table are kept.

    On a crash: nothing has happened. A COMMIT that the handler sends, past every guard, is refused by the server.
    The message counts as not processed, whether it was or not. Its External calls are not made: results that are
    stored are used. What no rollback takes back is not: numbers drawn from sequences, and what the handler does on
    other connections or elsewhere. Locks are held until the end, like those of a real run.
    Raises Retryable for the database's own trouble, such as another transaction that changes the same rows.
    """
    for _ in range(_RUNS - 1):
        try:
            return _run(app, handler, stream, record, rows)
        except Conflict:
            continue  # under REPEATABLE READ any concurrent write to the same row is one; rolled back, so run it again
    return _run(app, handler, stream, record, rows)


def _run(app: App, handler: Handler, stream: Stream, record: Record, rows: int) -> Trial:
    database, settings = app.database, app.settings
    engine = database.engine.execution_options(isolation_level="REPEATABLE READ")
    timeouts = Timeouts(settings.statement_timeout, settings.lock_timeout, settings.idle_in_transaction_timeout)
    connection = WorkerConnection(Database(engine, database.schema), timeouts, handler=handler.group)
    try:
        with connection.begin(f"{handler.group}: trying {record}") as open_connection:
            raise _RolledBack(_attempt(app, handler, stream, record, connection, open_connection, rows))
    except _RolledBack as end:
        return end.trial
    finally:
        connection.discard()


def _attempt(
    app: App,
    handler: Handler,
    stream: Stream,
    record: Record,
    connection: WorkerConnection,
    open_connection: Connection,
    rows: int,
) -> Trial:
    watch = RowWatch(open_connection, limit=rows)
    try:
        published = _call(app, handler, stream, record, open_connection)
        connection.check_intact()
        watch.check_constraints()
    except ResultMissing as missing:
        # Nobody's code failed: whoever reads the traceback would look for a fault in the handler.
        return Trial(replace(cause_of(missing, text=True), traceback=None))
    except Exception as error:
        trouble = passing_trouble(error, handler.group)
        if trouble is not None:
            raise trouble from error
        return Trial(cause_of(error, text=True))
    return Trial(None, watch.changes(app.database.engine), tuple(published))


def _call(app: App, handler: Handler, stream: Stream, record: Record, connection: Connection) -> list[OutboxMessage]:
    message = decode(handler, record)
    source = Source(handler.group, stream.topic_id, record.partition, record.offset, record.timestamp)
    calls = ExternalCalls(handler, app.database, stream, owner="trial")
    results = calls.stored(connection, message)
    _check_stored(handler, results)
    with handler_session(app.session_factory, connection, handler=handler.group) as session:
        tx = Tx(session, app_name=app.name, consumer=handler.group)
        if handler.batch:
            tx.enter_batch([source])
            handler.call_batch([message], tx)
            for error in tx.take_failed().values():
                raise error
        else:
            tx.enter(message, source, results)
            handler.call(message, tx)
    return tx.take_outbox()


def _check_stored(handler: Handler, results: Results) -> None:
    missing = [repr(external.name) for external in handler.external if external.name not in (results or {})]
    if missing:
        raise ResultMissing(
            f"the handler was not run: there is no stored result of {', '.join(missing)}, which was never called, or "
            "is unresolved (eo external ls). A replay would call it, or do what its `unresolved` says; a trial calls "
            "nothing."
        )
