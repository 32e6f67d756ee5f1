"""What a handler gets besides its message: the Session of the unit of work, and `publish` into the same transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy.orm import Session
from typing_extensions import TypeVar

from eoframework.cloudevents import traceparent_of
from eoframework.db.savepoints import SessionBuffer
from eoframework.errors import HandlerMisuse
from eoframework.message import Message, OutboxMessage, Source, derived_id
from eoframework.parts import Part
from eoframework.topic import Topic

T = TypeVar("T")

_INFO = "eoframework.tx"


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

    # --- for the executor ---

    def enter(self, message: Message[object], source: Source) -> None:
        """The handler is about to be called for `message`."""
        self._message = message
        self._sources = {(source.partition, source.offset): source}
        self._published = {}

    def enter_batch(self, sources: Iterable[Source] = ()) -> None:
        """The handler is about to be called for the messages of these sources."""
        self._message = None
        self._sources = {(source.partition, source.offset): source for source in sources}
        self._published = {}

    def take_outbox(self) -> list[OutboxMessage]:
        """What the handler published and did not roll back, in its order."""
        return [pending.message for pending in self._buffer.take()]

    def _trace(self, cause: Message[object] | None) -> str | None:
        about = cause or self._message
        return None if about is None else traceparent_of(about.headers)

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
