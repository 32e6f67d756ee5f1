"""A Kafka topic as the program knows it: name, payload type, key and id, and how they become bytes and back."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from operator import attrgetter
from types import NoneType
from typing import Any, Generic, NoReturn, overload
from uuid import UUID

from typing_extensions import TypeForm, TypeVar

from eoframework import cloudevents, parts
from eoframework.codec import BytesCodec, Codec, JsonCodec
from eoframework.errors import DeclarationError, DecodeError, EncodeError
from eoframework.message import Message, OutboxMessage, Record, new_id, parse_id
from eoframework.parts import Part
from eoframework.payload_types import has_field, members, record_classes, takes_none, type_name, unwrap
from eoframework.where import declaring_frame, location

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_MAX_BYTES = 1_000_000
"""librdkafka's `message.max.bytes`; below the broker's and the topic's default, 1 MiB with the batch's overhead."""

# The longest that our own headers' names and fixed values get, without type and source: counted so that a row which
# the broker would refuse is refused in the user's transaction instead.
_OWN_HEADERS = 400
_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")


class Topic(Generic[T]):
    """A topic whose messages carry payloads of one type. Opens nothing; may be shared by apps and threads."""

    @overload
    def __init__(
        self,
        name: str,
        payload_type: type[T],
        *,
        key: str | Callable[[T], Part | None] | None = None,
        id: str | Callable[[T], Part | None] | None = None,
        codec: Codec[Any] | None = None,
        partitions: int | None = None,
        replication_factor: int | None = None,
        config: Mapping[str, str] | None = None,
        ordered: bool = True,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None: ...

    @overload
    def __init__(
        self,
        name: str,
        payload_type: TypeForm[T],
        *,
        key: str | Callable[[T], Part | None] | None = None,
        id: str | Callable[[T], Part | None] | None = None,
        codec: Codec[Any] | None = None,
        partitions: int | None = None,
        replication_factor: int | None = None,
        config: Mapping[str, str] | None = None,
        ordered: bool = True,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None: ...

    def __init__(
        self,
        name: str,
        payload_type: Any,
        *,
        key: str | Callable[[T], Part | None] | None = None,
        id: str | Callable[[T], Part | None] | None = None,  # noqa: A002 - the user's word for it
        codec: Codec[Any] | None = None,
        partitions: int | None = None,
        replication_factor: int | None = None,
        config: Mapping[str, str] | None = None,
        ordered: bool = True,
        max_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        """Declare a topic.

        payload_type: pydantic model, dataclass, TypedDict, dict, bytes, a union of them, or `T | None`: then a record
        without a value (a tombstone) is the payload None.
        key: field name or function; messages of one key keep their order. None, or a function that returns None: no
        order. Key 7 and key "7" are the same bytes, so the same key.
        id: field name or function; what makes two messages of this topic the same one for a consumer, whoever sent
        them. Only for a topic with at most one message per value: the second one counts as a duplicate.
        codec: default JSON by pydantic, or the bytes as they are. ordered=False: publishers of one key do not wait for
        each other's COMMIT, its order is then not kept.
        partitions, replication_factor, config: for `eo topics apply`. max_bytes: of key, value and headers together.

        Raises DeclarationError.
        """
        self.where = location(declaring_frame())
        self.name = name
        self.payload_type = payload_type
        self.partitions = partitions
        self.replication_factor = replication_factor
        self.config: Mapping[str, str] = dict(config or {})
        self.ordered = ordered
        self.max_bytes = max_bytes
        self._check_values()
        self._takes_none = takes_none(payload_type)
        self._codec = codec or self._default_codec()
        self._key = self._reader(key, "key")
        self._id = self._reader(id, "id")

    def __repr__(self) -> str:
        return f"Topic({self.name!r})"

    @property
    def has_id(self) -> bool:
        """Whether the payload itself names the message, so that a producer's duplicates are always recognised."""
        return self._id is not None

    def decode(self, record: Record) -> Message[T]:
        """The message in a record. Raises DecodeError: it concerns this record alone."""
        payload = self.decode_payload(record)
        message_id = cloudevents.incoming_id(record.headers, topic=self.name)
        if message_id is None and self._id is not None and payload is not None:
            message_id = self._read_id(payload, record)
        return Message(
            payload=payload,
            id=message_id,
            key=record.key,
            headers=record.headers,
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            timestamp=parts.timestamp(record.timestamp),
        )

    def encode(
        self,
        payload: T,
        *,
        source: str,
        key: Part | None = None,
        id: UUID | str | None = None,  # noqa: A002 - the user's word for it
        headers: Mapping[str, str | bytes] | None = None,
        delay: timedelta | float | None = None,
        deliver_at: datetime | None = None,
        default_id: UUID | None = None,
        traceparent: str | None = None,
    ) -> OutboxMessage:
        """The outbox message for a payload: its id is `id`, else the topic's id of the payload, else `default_id`,
        else a new one.

        Raises EncodeError: nothing was published.
        """
        value = self.encode_payload(payload)
        message = OutboxMessage(
            id=self.choose_id(payload, id) or default_id or new_id(),
            topic=self.name,
            key=self.encode_key(payload, key),
            payload=value,
            type=self.type_of(type(payload)),
            source=source,
            content_type=self.content_type,
            headers=parts.headers(headers, self.name),
            deliver_at=parts.due(delay, deliver_at, self.name),
            ordered=self.ordered,
            traceparent=traceparent,
        )
        size = self.size_of_headers(source, message.type) + parts.size_of(message.headers)
        self.check_size(message.key, message.payload, size)
        return message

    # --- declaring ---

    def _check_values(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name) or self.name in {".", ".."}:
            self._refuse(f"topic name {self.name!r} is not one.", "Kafka takes 1 to 249 of a-z A-Z 0-9 . _ -")
        if self.partitions is not None and self.partitions < 1:
            self._refuse(f"partitions={self.partitions}.", "A topic has at least one.")
        if self.replication_factor is not None and self.replication_factor < 1:
            self._refuse(f"replication_factor={self.replication_factor}.", "A topic has at least one replica.")
        if self.max_bytes < 1:
            self._refuse(f"max_bytes={self.max_bytes}.", "Give the number of bytes that a message may have.")
        if not members(self.payload_type):
            self._refuse("a payload type that is only None.", "Give the type of the payload, or `T | None`.")

    def _default_codec(self) -> Codec[Any]:
        if any(member in (bytes, bytearray, memoryview) for member in members(self.payload_type)):
            if members(self.payload_type) != (bytes,):
                self._refuse("bytes cannot be one of several payload types.", "Use bytes alone, or give a codec=.")
            return BytesCodec()
        try:
            return JsonCodec(self.payload_type)
        except Exception as error:  # noqa: BLE001 - whatever a type's own schema hook raises, the declaration is wrong
            detail = str(error).split("\n", 1)[0]
            self._refuse(
                f"payload type {unwrap(self.payload_type)!r} cannot be written as JSON: {detail}",
                "Use a pydantic model, dataclass, TypedDict, dict or bytes, declared before the topic; or a codec=.",
                error,
            )

    def _reader(self, how: str | Callable[[T], Part | None] | None, what: str) -> Callable[[T], Part | None] | None:
        if how is None or callable(how):
            return how
        if not isinstance(how, str) or not has_field(self.payload_type, how):
            self._refuse(
                f"{what}={how!r} is no field of {unwrap(self.payload_type)!r}.",
                f"Give the name of a field that every payload has, or a function: {what}=lambda payload: ...",
            )
        # The codec takes nothing else then: no need to ask each payload whether it is a mapping.
        objects = isinstance(self._codec, JsonCodec) and record_classes(self.payload_type)
        return attrgetter(how) if objects else _field_reader(how)

    def _refuse(self, what: str, remedy: str, cause: Exception | None = None) -> NoReturn:
        raise DeclarationError(f"{self.where}: Topic({self.name!r}): {what}", remedy=remedy) from cause

    # --- reading ---

    def decode_payload(self, record: Record) -> Any:
        """What the message in a record says, without its envelope. Raises DecodeError."""
        if record.value is None:
            if self._takes_none:
                return None
            raise DecodeError(
                f"{record}: the record has no value (a tombstone), but the payload is {unwrap(self.payload_type)!r}.",
                remedy="Declare the topic as Topic(name, T | None) to receive tombstones as None.",
            )
        try:
            return self._codec.decode(record.value)
        except Exception as error:  # a codec is anybody's code; the record fails, not the worker
            kind, detail = unwrap(self.payload_type), parts.describe(error)
            raise DecodeError(
                f"{record}: {len(record.value)} bytes are no {getattr(kind, '__name__', kind)}: {detail}",
                remedy="Correct the producer, or widen the payload type.",
            ) from error

    def decode_payloads(self, records: Sequence[Record]) -> list[Any] | None:
        """What these messages say; None if one has nothing, or nothing readable: then each is to be read by itself."""
        if not isinstance(self._codec, JsonCodec):
            return None
        try:
            return self._codec.decode_all([record.value for record in records])
        except (TypeError, ValueError):
            return None

    def _read_id(self, payload: T, record: Record) -> UUID | None:
        assert self._id is not None
        try:
            value = self._id(payload)
        except KeyError:
            return None  # a dict without the field has no id; its position protects it
        except Exception as error:  # the user's function; the record fails, not the worker
            raise DecodeError(f"{record}: the topic's id= failed: {parts.describe(error)}") from error
        if value is None:
            return None
        try:
            return self._namespaced(value)
        except EncodeError as error:
            raise DecodeError(f"{record}: the topic's id= gave no id: {error}") from error

    # --- writing: the parts of a message, for `encode` and for those who need no outbox message of them ---

    @property
    def content_type(self) -> str:
        """The media type of its payloads."""
        return self._codec.content_type

    def type_of(self, kind: type) -> str:
        """The `ce_type` of payloads of this class."""
        return type_name(kind, self.payload_type) or self.name

    def encode_payload(self, payload: T) -> bytes | None:
        """The payload as a record's value. Raises EncodeError."""
        if payload is None:
            if self._takes_none:
                return None
            raise EncodeError(f"{self.name}: None is no payload.", remedy="Declare the topic as Topic(name, T | None).")
        try:
            value: object = self._codec.encode(payload)
        except Exception as error:  # a codec is anybody's code; nothing was published
            detail = parts.describe(error)
            bare = unwrap(self.payload_type)
            expected = bare.__name__ if isinstance(bare, type) else bare
            raise EncodeError(
                f"{self.name}: a {type(payload).__name__} cannot be written as {expected}: {detail}"
            ) from error
        if not isinstance(value, bytes):
            returned = type(value).__name__
            raise EncodeError(f"{self.name}: the codec returned {returned}.", remedy="It must return bytes.")
        return value

    def encode_payloads(self, payloads: Sequence[T]) -> list[bytes | None]:
        """As `encode_payload` for each of them. Raises EncodeError for the first that cannot be written."""
        if isinstance(self._codec, JsonCodec) and NoneType not in map(type, payloads):
            try:
                return [*self._codec.encode_all(payloads)]
            except (TypeError, ValueError):
                log.debug("%s: one of %d payloads cannot be written; one by one it shows", self.name, len(payloads))
        return [self.encode_payload(payload) for payload in payloads]

    def encode_key(self, payload: T, given: Part | None) -> bytes | None:
        """The record's key: `given`, else the topic's key of the payload, if it has one. Raises EncodeError."""
        key = given
        if key is None and self._key is not None and payload is not None:
            key = self._ask(self._key, payload, "key")
        if type(key) is str and key.isascii():  # most are, and need no more checks
            return key.encode()
        if key is None:
            if payload is None:
                raise EncodeError(
                    f"{self.name}: a tombstone without a key deletes nothing and brokers refuse it.",
                    remedy="Give it: publish(..., None, key=...).",
                )
            return None
        return key if isinstance(key, bytes) else parts.text(key, self.name, "key").encode()

    def choose_id(self, payload: T, given: UUID | str | None) -> UUID | None:
        """The message's id: `given`, else the topic's id of the payload, if it has one. Raises EncodeError."""
        if given is not None:
            return self._namespaced(given)
        if self._id is None or payload is None:
            return None
        value = self._ask(self._id, payload, "id")
        return None if value is None else self._namespaced(value)

    def _ask(self, reader: Callable[[T], Part | None], payload: T, what: str) -> Part | None:
        try:
            return reader(payload)
        except Exception as error:  # the user's function or a dict without the field
            raise EncodeError(f"{self.name}: the payload's {what} cannot be read: {parts.describe(error)}") from error

    def _namespaced(self, value: Part) -> UUID:
        if isinstance(value, UUID):
            return value
        text = value.hex() if isinstance(value, bytes) else parts.text(value, self.name, "id")
        if not text or len(text.encode()) > cloudevents.MAX_ID_BYTES:
            raise EncodeError(
                f"{self.name}: a message id has 1 to {cloudevents.MAX_ID_BYTES} bytes, this one {len(text.encode())}."
            )
        return parse_id(text, namespace=self.name)

    def size_of_headers(self, source: str, type_: str) -> int:
        """At most so many bytes has a message besides key, payload and its publisher's own headers."""
        return _OWN_HEADERS + len(source.encode()) + len(type_.encode()) + len(self.content_type)

    def check_size(self, key: bytes | None, payload: bytes | None, headers: int) -> None:
        """Refuse what Kafka would refuse, headers being so many bytes. Raises EncodeError."""
        value = len(payload or b"")
        size = value + len(key or b"") + headers
        if size > self.max_bytes:
            raise EncodeError(
                f"{self.name}: the message has {size} bytes ({value} of them payload), allowed are {self.max_bytes}.",
                remedy="Send a reference to the data instead, compress it in a codec, or raise all three: "
                "Topic(max_bytes=), the topic's max.message.bytes and EO_KAFKA_MESSAGE_MAX_BYTES of the process that "
                "sends to Kafka.",
            )


def _field_reader(name: str) -> Callable[[Any], Any]:
    return lambda payload: payload[name] if isinstance(payload, Mapping) else getattr(payload, name)
