"""Calling the handler for the messages of one unit of work, in order; who failed, and who must wait behind whom."""

from __future__ import annotations

from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from eoframework.consume.batch import Delivery, Place
from eoframework.db.faults import passing_trouble
from eoframework.db.parking import Lane
from eoframework.db.position import Stream
from eoframework.db.session import Connection, SessionFactory
from eoframework.db.unit_of_work import WorkerConnection, handler_session
from eoframework.errors import BatchItemFailed, ConfigurationError, FailClosed, HandlerMisuse, Retryable
from eoframework.failures import words
from eoframework.handlers import Handler
from eoframework.message import Message, OutboxMessage, Record, Source
from eoframework.tx import Tx

# A savepoint costs about as much as a message, and a failure half of these once more: the best at 1 % of poison [M].
_GROUP = 25
LEAVING = (SystemExit, GeneratorExit, CancelledError)
"""What a message's code may raise that is no Exception: sys.exit(), a cancelled event loop."""


class HandlerError(Exception):
    """What a handler raised, wrapped so that it is not taken for an error of ours."""

    def __init__(self, error: Exception, at: Place | None = None) -> None:
        """`at`: the message that the handler was called for, if it was one."""
        super().__init__(words(error))
        self.error = error
        self.at = at


class Culprits(Exception):
    """The handler says which messages failed, and the others cannot stay: all is rolled back and runs without them."""

    def __init__(self, errors: dict[Place, Exception]) -> None:
        super().__init__(f"{len(errors)} messages of a batch failed")
        self.errors = errors


@dataclass(slots=True)
class Walk:
    """What has become of the deliveries so far, in their order."""

    shut: set[Lane]
    """Lanes in which something waits: what comes later in them waits behind it."""
    shuts: Callable[[Delivery, Exception], bool]
    """Whether this failure shuts the message's lane."""
    ran: list[Delivery] = field(default_factory=list)
    fallen: list[Delivery] = field(default_factory=list)
    """Failed, each with its error."""
    behind: list[Delivery] = field(default_factory=list)
    calling: Delivery | None = None
    """The one that the handler was last called for."""
    left: Sequence[Delivery] = ()
    """Not reached in time."""
    outbox: list[OutboxMessage] = field(default_factory=list)

    @property
    def progress(self) -> bool:
        """Whether anything has been decided: then what is left may wait."""
        return bool(self.ran or self.fallen or self.behind)

    def admits(self, delivery: Delivery) -> bool:
        """Whether the handler is to be called for it now; if not, it is put where it belongs."""
        if delivery.lane in self.shut:
            self.behind.append(delivery)
            return False
        if delivery.error is not None:
            self.fell(delivery, delivery.error)
            return False
        return True

    def fell(self, delivery: Delivery, error: Exception) -> None:
        self.fallen.append(delivery.failed(error))
        if self.shuts(delivery, error):
            self.shut.add(delivery.lane)

    def copy(self) -> Walk:
        return Walk(set(self.shut), self.shuts, [*self.ran], [*self.fallen], [*self.behind])


class _Fall(NamedTuple):
    """A group of messages that was taken back to its savepoint."""

    error: Exception
    at: Delivery | None
    """Which one failed; None when it was the flush of all of them."""


class HandlerCalls:
    """One handler, called inside a worker's transaction."""

    def __init__(
        self,
        handler: Handler,
        stream: Stream,
        connection: WorkerConnection,
        session_factory: SessionFactory,
        *,
        app_name: str,
        shuts: Callable[[Delivery, Exception], bool],
    ) -> None:
        self._handler = handler
        self._stream = stream
        self._connection = connection
        self._session_factory = session_factory
        self._app_name = app_name
        self._shuts = shuts

    def run(
        self,
        connection: Connection,
        first: Sequence[Delivery],
        *,
        shut: set[Lane],
        wary: bool = False,
        out_of_time: Callable[[], bool] = lambda: False,
    ) -> Walk:
        """Call the handler for each delivery that may run, in order, in one session.

        `wary`: with a savepoint for every few messages, so that one that fails does not take all the others along.
        Raises HandlerError, Culprits; whatever the flush at the end raises.
        """
        walk = Walk(set(shut), self._shuts)
        with handler_session(self._session_factory, connection, handler=self._handler.group) as session:
            tx = Tx(session, app_name=self._app_name, consumer=self._handler.group)
            if self._handler.batch:
                self._as_list(tx, walk, first)
            elif wary:
                walk = self._in_groups(tx, walk, first, out_of_time)
            else:
                self._in_turn(tx, walk, first, out_of_time)
        walk.outbox = tx.take_outbox()
        return walk

    # --- one by one ---

    def _in_turn(
        self,
        tx: Tx,
        walk: Walk,
        first: Sequence[Delivery],
        out_of_time: Callable[[], bool] = lambda: False,
        intact: Callable[[], bool] = lambda: True,
    ) -> None:
        for place, delivery in enumerate(first):
            if walk.progress and out_of_time():
                walk.left = first[place:]
                return
            if walk.admits(delivery):
                walk.calling = delivery
                self._check_called_outside(delivery)
                message = message_of(delivery)
                tx.enter(message, self._source(message, delivery.record), delivery.external)
                self._call(partial(self._handler.call, message, tx), delivery.place)
                if not intact():
                    # A failed flush has taken the savepoint back, and the handler has caught its error: what it did
                    # for this message is gone, and what comes next would run outside.
                    raise HandlerMisuse(
                        f"{self._handler.group} caught a database error and went on: what it had done is lost.",
                        remedy="Let the error out, or put what may fail into `with tx.session.begin_nested():`.",
                    )
                walk.ran.append(delivery)

    # --- with savepoints ---

    def _in_groups(self, tx: Tx, walk: Walk, first: Sequence[Delivery], out_of_time: Callable[[], bool]) -> Walk:
        groups = deque(first[start : start + _GROUP] for start in range(0, len(first), _GROUP))
        while groups:
            if walk.progress and out_of_time():
                walk.left = [delivery for group in groups for delivery in group]
                break
            group = groups.popleft()
            after = self._saved(tx, walk, group)
            if isinstance(after, Walk):
                walk = after
            elif len(group) == 1:
                walk.fell(group[0], after.error)
            else:
                groups.extendleft(reversed(_around(group, after.at)))
        return walk

    def _saved(self, tx: Tx, walk: Walk, group: Sequence[Delivery]) -> Walk | _Fall:
        """The walk on over these messages; or which one failed, and none of them has left a trace."""
        after = walk.copy()
        try:
            with tx.session.begin_nested() as savepoint:
                self._in_turn(tx, after, group, intact=lambda: savepoint.is_active)
        except (ConfigurationError, FailClosed, Retryable):
            raise
        except Exception as error:
            cause = error.error if isinstance(error, HandlerError) else error
            if passing_trouble(cause, self._handler.group) is not None:
                raise
            self._connection.check_intact()
            if not (tx.session.is_active and tx.session.connection().in_transaction()):
                raise  # it has ended the transaction itself: there is no savepoint to go on from
            # SQLAlchemy forgets only what was changed inside a savepoint. What was read there may show effects that
            # were taken back with it, and lives on in the error's traceback: they would count twice.
            tx.session.expire_all()
            return _Fall(cause, after.calling if isinstance(error, HandlerError) else None)
        return after

    # --- as a list ---

    def _as_list(self, tx: Tx, walk: Walk, first: Sequence[Delivery]) -> None:
        ready = [delivery for delivery in first if walk.admits(delivery)]
        if not ready:
            return
        messages = [message_of(delivery) for delivery in ready]
        tx.enter_batch(self._source(m, d.record) for m, d in zip(messages, ready, strict=True))
        try:
            self._call(lambda: self._handler.call_batch(messages, tx), ready[0].place if len(ready) == 1 else None)
        except HandlerError as error:
            if isinstance(error.error, BatchItemFailed):
                raise Culprits({self._named(ready, error.error): _item_error(error.error)}) from error
            raise
        self._set_aside(walk, ready, tx.take_failed())

    def _named(self, ready: Sequence[Delivery], error: BatchItemFailed) -> Place:
        if not 0 <= error.index < len(ready):
            misuse = HandlerMisuse(
                f"{self._handler.group}: BatchItemFailed({error.index}), but the batch has {len(ready)} messages.",
                remedy="Give the index in the list the handler was called with.",
            )
            raise HandlerError(misuse) from error
        return ready[error.index].place

    def _set_aside(self, walk: Walk, ready: Sequence[Delivery], errors: dict[int, Exception]) -> None:
        """What `tx.fail` named falls, and the rest stays.

        Unless something ran that now has to wait: a later message of its key, or of its partition where that stops.
        """
        culprits = Culprits({ready[index].place: error for index, error in errors.items()})
        lanes = {ready[index].lane for index in errors}
        if errors and (not self._handler.policy.parks or any(d.lane in lanes for d in (*walk.fallen, *walk.behind))):
            raise culprits
        for index, delivery in enumerate(ready):
            if index in errors:
                walk.fell(delivery, errors[index])
            elif errors and delivery.lane in walk.shut:
                raise culprits
            else:
                walk.ran.append(delivery)

    def _check_called_outside(self, delivery: Delivery) -> None:
        # Its id was recorded when its calls were due, so none was made; and forgotten since, by a replay of its twin.
        if self._handler.external and delivery.external is None:
            raise Retryable(f"{self._handler.group}: {delivery.record} is no duplicate any more.")

    def _call(self, call: Callable[[], object], at: Place | None) -> None:
        try:
            call()
        except Exception as error:
            raise HandlerError(error, at) from error
        except LEAVING as error:
            # It would end the worker cleanly, so that the next one fears nothing, and meets the same message again.
            misuse = HandlerMisuse(
                f"{self._handler.group} raised {type(error).__name__}({words(error)}), which is no Exception.",
                remedy="What a message is to be blamed for must be one; leave the process to its supervisor.",
            )
            raise HandlerError(misuse, at) from error
        self._connection.check_intact()

    def _source(self, message: Message[object], record: Record) -> Source:
        return Source(self._handler.group, self._stream.topic_id, message.partition, message.offset, record.timestamp)


def _around(group: Sequence[Delivery], culprit: Delivery | None) -> list[Sequence[Delivery]]:
    """The group once more: what comes before the culprit, then it alone, which shows whether it is one, then the rest.

    It may have failed of what an earlier one left to be flushed.
    """
    if culprit is None:
        return [[delivery] for delivery in group]
    at = next(place for place, delivery in enumerate(group) if delivery.place == culprit.place)
    return [part for part in (group[:at], [group[at]], group[at + 1 :]) if part]


def message_of(delivery: Delivery) -> Message[object]:
    """The message of a delivery that may run."""
    if delivery.message is None:
        raise AssertionError(f"{delivery.record} was not decoded")
    return delivery.message


def _item_error(error: BatchItemFailed) -> Exception:
    cause = error.__cause__
    return cause if isinstance(cause, Exception) else error
