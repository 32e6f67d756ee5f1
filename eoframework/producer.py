"""The Producer: sends messages to Kafka for code that has no database transaction to join."""

from __future__ import annotations

import atexit
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar, overload
from uuid import UUID, uuid4

from eoframework import clock
from eoframework.errors import ConfigurationError, EoError, OutcomeUnknown, Permanent
from eoframework.kafka.config import sending_config
from eoframework.kafka.destinations import Destination, Destinations
from eoframework.kafka.sending import SendingClients
from eoframework.parts import Part
from eoframework.producer_records import Draft, Headers, Item, Records
from eoframework.producer_transaction import KafkaTransaction, Turn
from eoframework.sent import Batch, Pending, Promise, Sent
from eoframework.settings import Settings
from eoframework.topic import Topic
from eoframework.transforms import Out

_log = logging.getLogger(__name__)

T = TypeVar("T")

_NAME = re.compile(r"[a-zA-Z0-9._-]{1,100}")
# Every message is reported within message.timeout.ms; a little later something is wrong with the client itself.
_MARGIN = 10.0
_AT_EXIT = 15.0
_REMEMBERED = 1000
_CHUNK = 2000


class Producer:
    """Sends messages, singly, many at a time, or in Kafka transactions; each is confirmed by all in-sync replicas.

    Opens nothing before it first sends. `send`, `send_many`, `send_soon` and `flush` may be called from many threads;
    Kafka transactions are one at a time. Not to be used across a fork. Close it, or use it as a context manager: what
    was sent is waited for. In a handler use `tx.publish` instead: what is sent from there stays sent when the handler's
    transaction is rolled back.
    """

    def __init__(self, settings: Settings | None = None, *, name: str | None = None, source: str | None = None) -> None:
        """Remember how; connects to nothing.

        settings: default EO_*. name: makes the transactional.id `eo.producer.<name>`, the same in every process of that
        name: the newest fences the others and ends their open transaction. Without it every Producer has its own.
        source: CloudEvents' `source` of the messages, default the name. Raises ConfigurationError.
        """
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigurationError(
                f"Producer(name={name!r}): not usable.", remedy="Use 1 to 100 of a-z A-Z 0-9 . _ -"
            )
        self._settings = settings or Settings.load()
        self._settings.require_bootstrap_servers()
        self._name = name
        self._records = Records(source or name or "eoframework")
        self._transactional_id = f"eo.producer.{name or uuid4()}"
        self._patience = self._settings.transaction_timeout
        self._lock = threading.Lock()
        self._process: int | None = None
        self._closed = False
        self._failed: deque[Pending] = deque()
        self._forget_at = _REMEMBERED
        self._destinations = Destinations(self._settings)
        client_id = f"eo-producer-{name or os.getpid()}"
        self._clients = SendingClients(sending_config(self._settings, client_id=client_id))
        self._turn = Turn(self._settings, transactional_id=self._transactional_id, shared=name is not None)

    def __repr__(self) -> str:
        return f"Producer({self._transactional_id})"

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except EoError as late:
            if error is None:
                raise
            # The block's own error is the one to raise; this one must not be unheard either.
            error.add_note(f"closing {self!r}: {late}")

    # --- sending ---

    def send(
        self,
        topic: Topic[T],
        payload: T,
        *,
        key: Part | None = None,
        id: UUID | str | None = None,  # noqa: A002 - the user's word for it
        headers: Headers = None,
        traceparent: str | None = None,
        timeout: float | None = None,
    ) -> Sent:
        """Send one message and wait until all in-sync replicas hold it.

        On a crash: it is written once or not at all; send it again with the same `id=`, and a second copy is recognised
        by whoever handles it. Independent of a Kafka transaction that is open on this Producer.
        key, id: override the topic's. headers: besides CloudEvents' own. traceparent: W3C trace context to pass on.
        timeout: seconds to wait at most, default EO_TRANSACTION_TIMEOUT, within which Kafka must take a message anyway.
        Raises EncodeError, ConfigurationError (no such topic, no right), Retryable: it was not written. OutcomeUnknown:
        it may be written, now or later. Source: KIP-98 for the idempotence.
        """
        deadline = self._deadline(timeout)
        self._refuse_own_thread()
        ticket = self._post(Item(topic, payload, key, id, headers, traceparent), deadline)
        try:
            return ticket.pending.result(max(deadline - clock.monotonic(), 0) + (_MARGIN if timeout is None else 0))
        except TimeoutError:
            ticket.pending.heard = True
            raise ticket.unconfirmed() from None

    def send_soon(
        self,
        topic: Topic[T],
        payload: T,
        *,
        key: Part | None = None,
        id: UUID | str | None = None,  # noqa: A002 - the user's word for it
        headers: Headers = None,
        traceparent: str | None = None,
        timeout: float | None = None,
    ) -> Future[Sent]:
        """Queue one message; the Future has its Sent, or raises what `send` raises. It cannot be cancelled.

        On a crash: what the Future has not confirmed may be written or not. A failure that nobody asked its Future for
        is raised by the next `flush` or `close`. Messages of one key stay in the order of the calls.
        Its done-callbacks run on the Producer's thread: they must be short, and cannot `send`. In asyncio:
        `await asyncio.wrap_future(producer.send_soon(...))`.
        timeout: how long to wait for room in the queue, or, at a topic's first message, for Kafka.
        Raises at once what shows before it is queued: EncodeError, ConfigurationError, Retryable.
        """
        return self._post(Item(topic, payload, key, id, headers, traceparent), self._deadline(timeout)).pending

    @overload
    def send_many(self, topic: Topic[T], payloads: Iterable[T], /, *, timeout: float | None = None) -> list[Sent]: ...
    @overload
    def send_many(self, outs: Iterable[Out[Any]], /, *, timeout: float | None = None) -> list[Sent]: ...
    def send_many(
        self, first: Any, payloads: Iterable[Any] | None = None, /, *, timeout: float | None = None
    ) -> list[Sent]:
        """Send payloads to one topic, or `Out`s to several, and wait until all in-sync replicas hold them all.

        On a crash: each is written once or not at all; an iterable is read as it is sent. Messages of one key stay in
        order. Not one transaction: see `transaction`.
        timeout: seconds for all of it, default EO_TRANSACTION_TIMEOUT for each message.
        Raises NotAllSent as soon as one fails, with what became of each; what the iterable raises.
        """
        self._check_usable()
        self._refuse_own_thread()
        end = None if timeout is None else clock.monotonic() + timeout
        batch = Batch()
        try:
            items = _items(first, payloads)
            while self._place_some(items, batch, end):
                self._wait(batch, end, until=_CHUNK)
        except EoError as error:
            batch.refuse(error)
        except Exception as error:  # the user's iterable: what it gave so far is on its way
            self._wait(batch, end)
            error.add_note(f"{len(batch.sent)} messages before it were sent by {self!r}.")
            raise
        self._wait(batch, end)
        return batch.all_sent()

    def transaction(self) -> KafkaTransaction:
        """`with producer.transaction() as t: t.send(...)`: readers see all of it or, after any error, nothing.

        On a crash: nothing, unless the commit had reached Kafka; then all. `read_committed` readers only, as handlers
        and transforms are. One at a time in a Producer; the block belongs to its thread. Where the messages stand is in
        `t.sent` after the block. Raises Permanent when one is open already, Fenced when a Producer of the same name has
        taken over; the block raises what happened, and OutcomeUnknown when nobody can tell. Source: KIP-98.
        """
        self._check_usable()
        return KafkaTransaction(self._turn, self._prepare)

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every message is confirmed or failed, also those that other threads send meanwhile.

        timeout: seconds, default EO_TRANSACTION_TIMEOUT. Raises the first failure of a `send_soon` whose Future nobody
        has asked, once; OutcomeUnknown when the time is over.
        """
        self._check_usable()
        self._refuse_own_thread()
        deadline = self._deadline(timeout)
        left = self._clients.flush(deadline=deadline)
        self._raise_unheard()
        if left:
            raise OutcomeUnknown(f"{left} messages are not confirmed in time; they may still be.", ids=(), topics=())

    def close(self, timeout: float | None = None) -> None:
        """Wait for what was sent, as `flush` does, and end. A second call does nothing.

        timeout: seconds; what is not confirmed by then is given up, and its Future says what is known.
        Raises Permanent inside a transaction, on the thread of send_soon's callbacks, and in a forked child.
        """
        if self._closed:
            return
        self._check_usable()
        self._refuse_own_thread()
        if self._turn.taken:
            raise Permanent(f"{self!r} has an open Kafka transaction.", remedy="Close it after the with block.")
        self._end(self._deadline(timeout))
        self._raise_unheard()

    # --- one message ---

    def _post(self, item: Item, deadline: float) -> Promise:
        self._check_usable()
        draft, destination = self._prepare(item, deadline)
        if len(self._failed) >= self._forget_at:
            self._forget_heard()
        ticket = Promise(draft.id, destination, draft.size, self._failed)
        self._clients.send(draft.record(ticket), destination, deadline=deadline)
        return ticket

    def _place(self, item: Item, batch: Batch, end: float | None) -> None:
        deadline = clock.monotonic() + self._patience if end is None else end
        draft, destination = self._prepare(item, deadline)
        ticket = batch.ticket(draft.id, destination, draft.size)
        try:
            self._clients.send(draft.record(ticket), destination, deadline=deadline)
        except EoError as error:
            ticket.failed(error)

    def _prepare(self, item: Item, deadline: float) -> tuple[Draft, Destination]:
        draft = self._records.make(item)
        return draft, self._destinations.look(draft.topic, deadline=deadline)

    def _place_some(self, items: Iterator[Item], batch: Batch, end: float | None) -> bool:
        """Queue a chunk; whether there may be more to queue."""
        with self._clients.gate:
            for number, item in enumerate(items, start=1):
                self._place(item, batch, end)
                if batch.failure is not None:
                    return False
                if number == _CHUNK:
                    return True
        return False

    def _wait(self, batch: Batch, end: float | None, *, until: int = 0) -> None:
        batch.wait(self._patience + _MARGIN if end is None else max(end - clock.monotonic(), 0), until=until)

    def _deadline(self, timeout: float | None) -> float:
        return clock.monotonic() + (self._patience if timeout is None else timeout)

    # --- opening and ending ---

    def _check_usable(self) -> None:
        process = os.getpid()
        if self._process is None:
            self._open(process)
        # Before any lock: another thread of the parent may have held it at the fork, and never lets go here.
        if self._process != process:
            raise Permanent(
                f"{self!r} was opened by process {self._process} and is used in its fork {process}: the Kafka client's "
                "threads stayed there.",
                remedy="Make the Producer after the fork, or start processes with multiprocessing's 'spawn'.",
            )
        if self._closed:
            raise Permanent(f"{self!r} is closed; nothing was sent.", remedy="Make another Producer.")

    def _open(self, process: int) -> None:
        with self._lock:
            if self._process is None:
                self._process = process
                atexit.register(self._at_exit)

    def _refuse_own_thread(self) -> None:
        if self._clients.is_own_thread():
            raise Permanent(
                f"{self!r}: a done-callback of send_soon would wait for the thread that it runs on.",
                remedy="Call send_soon there, or hand the work to another thread.",
            )

    def _end(self, deadline: float) -> None:
        self._closed = True
        atexit.unregister(self._at_exit)
        self._clients.close(deadline=deadline)
        self._turn.close()

    def _at_exit(self) -> None:
        # A fork inherits its parent's exit handlers; the messages are the parent's too.
        if self._closed or self._process != os.getpid():
            return
        self._end(clock.monotonic() + min(self._patience, _AT_EXIT))
        try:
            self._raise_unheard()
        except EoError as error:
            _log.error("%r, at the end of the process: %s", self, error)

    def _take_failed(self) -> Iterator[Pending]:
        # One by one: what the clients' threads add meanwhile must not be thrown away with the rest.
        with suppress(IndexError):
            while True:
                yield self._failed.popleft()

    def _forget_heard(self) -> None:
        """A program that never flushes would keep every failure that its `send` raised long ago."""
        self._failed.extend([pending for pending in self._take_failed() if not pending.heard])
        self._forget_at = max(_REMEMBERED, 2 * len(self._failed))

    def _raise_unheard(self) -> None:
        unheard = [pending for pending in self._take_failed() if not pending.heard]
        if not unheard:
            return
        error = unheard[0].exception(0)
        assert isinstance(error, EoError)
        if len(unheard) > 1:
            error.add_note(
                f"{len(unheard)} messages of send_soon failed that nobody has asked about; this is the first."
            )
        raise error


def _items(first: Any, payloads: Iterable[Any] | None) -> Iterator[Item]:
    if payloads is not None:
        return (Item(first, payload) for payload in payloads)
    return (_item(out) for out in first)


def _item(out: Any) -> Item:
    if not isinstance(out, Out):
        raise Permanent(
            f"send_many was given a {type(out).__name__} without a topic; it was not sent.",
            remedy="Write send_many(topic, payloads), or give Outs: send_many([Out(topic, payload)]).",
        )
    return Item(out.topic, out.payload, out.key, out.id, out.headers)
