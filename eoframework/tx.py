"""What a handler gets besides its message: the Session of the unit of work, and `publish` into the same transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy.orm import Session
from typing_extensions import TypeVar

from eoframework.cloudevents import traceparent_of
from eoframework.db.savepoints import SessionBuffer
from eoframework.errors import BatchItemFailed, HandlerMisuse, Retryable
from eoframework.external import Results
from eoframework.message import Message, OutboxMessage, Source, derived_id
from eoframework.parts import Part
from eoframework.topic import Topic

T = TypeVar("T")

_INFO = "eoframework.tx"
_NO_RESULTS: Results = {}


class Tx:
    """The unit of work of a handler: one database transaction, committed after the handler returned.

    On a crash: effects, published messages, the processed message and the position are there together or not at all.
    """

    def __init__(self, session: Session, *, app_name: str, consumer: str) -> None:
        self.session = session
        self._app_name = app_name
        self._consumer = consumer
        self._buffer = SessionBuffer(session)
        self._message: Message[object] | None = None
        self._sources: dict[tuple[int, int], Source] = {}
        self._published: dict[tuple[int, int], int] = {}
        self._failed: dict[int, Exception] | None = None
        self._external = _NO_RESULTS
        # So that code which is handed only the Session and says app.publish(session, ...) takes part here.
        session.info[_INFO] = self

    @property
    def message(self) -> Message[object]:
        """The message being handled: id, key, headers, topic, partition, offset, timestamp, attempt."""
        if self._message is None:
            raise HandlerMisuse(
                f"{self._consumer}: tx.message in a batch handler: there are many.",
                remedy="Take the batch as list[Message[...]].",
            )
        return self._message

    def publish(
        self,
        topic: Topic[T],
        payload: T,
        *,
        key: Part | None = None,
        id: UUID | str | None = None,  # noqa: A002 - the user's word for it
        headers: Mapping[str, str | bytes] | None = None,
        delay: timedelta | float | None = None,
        deliver_at: datetime | None = None,
        cause: Message[object] | None = None,
    ) -> None:
        """Publish `payload` if and when this unit of work commits; never otherwise, and once.

        On a crash: it stands in Kafka once if the unit of work was committed, not at all if it was not. A savepoint
        that is rolled back takes along what was published inside.
        delay: seconds or a timedelta; deliver_at: an aware datetime. A delayed message leaves its key's order.
        cause: in a batch handler, the message this one follows from; then its id is the same however often it runs.
        Raises EncodeError.
        """
        message = topic.encode(
            payload,
            source=self._app_name,
            key=key,
            id=id,
            headers=headers,
            delay=delay,
            deliver_at=deliver_at,
            default_id=self._derived_id(cause),
            traceparent=self._trace(cause),
        )
        self._buffer.add(message)

    def external(self, name: str) -> Any:
        """The stored result of the handler's External of this name, as JSON gave it back; never a call.

        Raises HandlerMisuse when the handler declares none.
        """
        if self._external is None:
            # Its id stood there when the calls were to be made, and was taken away since: it is being replayed.
            raise Retryable(f"{self._consumer}: {self._message} was processed a moment ago, and is to run again.")
        if name not in self._external:
            raise HandlerMisuse(
                f"{self._consumer}: tx.external({name!r}): there is no result of that name.",
                remedy="Declare it: @app.handler(topic, external=[External(...)]). When a message is only tried, no "
                "call is made, and there may be none yet.",
            )
        return self._external[name]

    def fail(self, item: int | Message[object], error: Exception | str) -> None:
        """In a batch handler: this message failed, the others count. Nothing of it may have been done, or published.

        item: its index in the list, or the message. It is retried, parked or given up as if it had been alone; later
        messages of its key in this list run again behind it. Raises HandlerMisuse.
        """
        places = list(self._sources)
        index = item if isinstance(item, int) else _index(places, (item.partition, item.offset))
        if self._failed is None or not 0 <= index < len(places):
            raise HandlerMisuse(
                f"{self._consumer}: tx.fail({item}): "
                + ("no such message." if self._failed is not None else "no batch."),
                remedy="Give the index in the list a batch handler was called with; elsewhere raise the error.",
            )
        self._failed[index] = error if isinstance(error, Exception) else BatchItemFailed(index, error)

    # --- for the executor ---

    def enter(self, message: Message[object], source: Source, external: Results = _NO_RESULTS) -> None:
        """The handler is about to be called for `message`; `external`: the results of its calls."""
        self._message = message
        self._external = external
        self._sources = {(source.partition, source.offset): source}
        self._published = {}

    def enter_batch(self, sources: Iterable[Source] = ()) -> None:
        """The handler is about to be called for the messages of these sources."""
        self._message = None
        self._sources = {(source.partition, source.offset): source for source in sources}
        self._published = {}
        self._failed = {}
        self._external = _NO_RESULTS

    def take_failed(self) -> dict[int, Exception]:
        """What the batch handler named as failed: index -> error."""
        failed, self._failed = self._failed or {}, None
        return failed

    def take_outbox(self) -> list[OutboxMessage]:
        """What the handler published and did not roll back, in its order."""
        return [pending.message for pending in self._buffer.take()]

    def _trace(self, cause: Message[object] | None) -> str | None:
        about = cause or self._message
        found = None if about is None else traceparent_of(about.headers)
        return None if found is None else found.decode()

    def _derived_id(self, cause: Message[object] | None) -> UUID | None:
        about = cause or self._message
        if about is None:
            return None
        place = (about.partition, about.offset)
        source = self._sources.get(place)
        if source is None:
            raise HandlerMisuse(
                f"{self._consumer}: cause={about} is not a message of this unit of work.",
                remedy="Give a message that the handler was called with.",
            )
        index = self._published.get(place, 0)
        self._published[place] = index + 1
        return derived_id(source, index)


def tx_of(session: Session) -> Tx | None:
    """The unit of work that a Session belongs to; None for a Session of the user's own."""
    found = session.info.get(_INFO)
    return found if isinstance(found, Tx) else None


def _index(places: list[tuple[int, int]], place: tuple[int, int]) -> int:
    return places.index(place) if place in places else -1
