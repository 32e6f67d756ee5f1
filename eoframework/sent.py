"""What a Producer gives back: where a message stands in Kafka, or what is known of it otherwise."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from eoframework import parts
from eoframework.errors import EoError, OutcomeUnknown
from eoframework.kafka.delivery import Ticket
from eoframework.kafka.destinations import Destination


class Sent(NamedTuple):
    """A message that all in-sync replicas hold."""

    partition: int
    offset: int
    timestamp: datetime | None
    id: UUID
    topic: str


class NotAllSent(EoError):
    """Some messages of a `send_many` failed; `results` says of each in turn: Sent, or the error that it met.

    Shorter than what was given: nothing after the last entry was tried. OutcomeUnknown: may be written; any other
    error: was not.
    """

    def __init__(self, what: str, *, results: Sequence[Sent | EoError]) -> None:
        super().__init__(
            what, remedy="What is no Sent in `results` is to be corrected or sent again; OutcomeUnknown with its id=."
        )
        self.results = tuple(results)


class Pending(Future[Sent]):
    """A Future that knows whether anybody has asked for its outcome."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = False
        # A message on its way cannot be called back.
        self.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> Sent:
        try:
            return super().result(timeout)
        finally:
            # Also when it raises the message's error; not when it only waited in vain.
            self.heard = self.heard or self.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            return super().exception(timeout)
        finally:
            self.heard = self.heard or self.done()


class Promise(Ticket):
    """The ticket of a message sent alone."""

    __slots__ = ("_failed", "pending")

    def __init__(self, id: UUID, destination: Destination, size: int, failed: deque[Pending]) -> None:  # noqa: A002
        """failed: gets the Future when it fails, for `flush`."""
        super().__init__(id, destination, size)
        self._failed = failed
        self.pending = Pending()

    def delivered(self, partition: int, offset: int, timestamp: int) -> None:
        topic = self.destination.topic
        self.pending.set_result(Sent(partition, offset, parts.timestamp(timestamp), self.id, topic))

    def failed(self, error: EoError) -> None:
        self._failed.append(self.pending)
        self.pending.set_exception(error)


class Batch:
    """Messages sent together: a result for each, in their order."""

    def __init__(self) -> None:
        self.results: list[Sent | EoError | None] = []
        self.tickets: list[Ticket] = []
        self.failure: EoError | None = None
        """The first one; whoever is still sending stops."""
        self._open = self._awaited = 0
        self._lock = threading.Lock()
        self._settled = threading.Event()

    def ticket(self, id: UUID, destination: Destination, size: int) -> Place:  # noqa: A002 - the message's word for it
        """The ticket of the next message."""
        place = Place(id, destination, size, self, len(self.results))
        with self._lock:
            self.results.append(None)
            self.tickets.append(place)
            self._open += 1
        return place

    def refuse(self, error: EoError) -> None:
        """Note that the next message could not even be given a ticket."""
        self.results.append(error)
        self.failure = self.failure or error

    def settle(self, index: int, result: Sent | EoError) -> None:
        """Note what became of a message."""
        self.results[index] = result
        if self.failure is None and isinstance(result, EoError):
            self.failure = result
        # Two clients have two threads.
        with self._lock:
            self._open -= 1
            if self._open <= self._awaited:
                self._settled.set()

    def wait(self, seconds: float, *, until: int = 0) -> None:
        """Until at most so many tickets were not told yet, or the time is over."""
        with self._lock:
            self._awaited = until
            self._settled.clear()
            if self._open <= until:
                return
        self._settled.wait(seconds)

    @property
    def sent(self) -> list[Sent]:
        """Those that Kafka holds."""
        return [result for result in self.results if isinstance(result, Sent)]

    def all_sent(self) -> list[Sent]:
        """Every message's Sent. Raises NotAllSent."""
        sent = self.sent
        if len(sent) == len(self.results):
            return sent
        known = [self._unknown(index) if result is None else result for index, result in enumerate(self.results)]
        first = next(result for result in known if isinstance(result, EoError))
        why = str(first).rstrip(".")
        what = f"{len(sent)} of the {len(known)} messages tried were sent; the first that failed: {why}."
        raise NotAllSent(what, results=known) from first

    def _unknown(self, index: int) -> OutcomeUnknown:
        return self.tickets[index].unconfirmed()


class Place(Ticket):
    """The ticket of a message in a batch."""

    __slots__ = ("_batch", "_index")

    def __init__(self, id: UUID, destination: Destination, size: int, batch: Batch, index: int) -> None:  # noqa: A002
        super().__init__(id, destination, size)
        self._batch = batch
        self._index = index

    def delivered(self, partition: int, offset: int, timestamp: int) -> None:
        topic = self.destination.topic
        self._batch.settle(self._index, Sent(partition, offset, parts.timestamp(timestamp), self.id, topic))

    def failed(self, error: EoError) -> None:
        self._batch.settle(self._index, error)
