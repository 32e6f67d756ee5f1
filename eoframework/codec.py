"""How payloads become bytes and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from types import GenericAlias
from typing import Any, Protocol, cast

from pydantic import TypeAdapter
from typing_extensions import TypeVar

from eoframework.payload_types import record_classes, required_keys

T = TypeVar("T")


class Codec(Protocol[T]):
    """Turns a payload into a record's value and back.

    Both methods may raise anything: it becomes an EncodeError at the publishing call, or a DecodeError that fails this
    one record. They must not depend on anything but their argument: a message may be decoded again after a crash.
    None never reaches a codec; a tombstone has no value.
    """

    @property
    def content_type(self) -> str:
        """The media type, sent as the `content-type` header."""
        ...

    def encode(self, payload: T) -> bytes: ...

    def decode(self, data: bytes) -> T: ...


class JsonCodec:
    """JSON by pydantic: models, dataclasses, TypedDicts, dicts, unions. Refuses a payload of another type."""

    content_type = "application/json"

    def __init__(self, payload_type: Any) -> None:
        self._type = payload_type
        self._adapter: TypeAdapter[Any] = TypeAdapter(payload_type)
        self._classes = record_classes(payload_type)
        self._required = required_keys(payload_type)

    def encode(self, payload: Any) -> bytes:
        self._check(payload)
        # The aliases are what decode expects. The adapter's own methods only pass arguments on, for 0.4 us each.
        return self._adapter.serializer.to_json(payload, warnings="error", by_alias=True)

    def encode_all(self, payloads: Sequence[Any]) -> list[bytes]:
        """As `encode` for each of them, in half the time; whatever it raises, `encode` says which one it was."""
        for payload in payloads:
            self._check(payload)
        # Being asked for errors costs one call as much as writing three payloads: so the list is asked for them once.
        self._lists.serializer.to_json(payloads, warnings="error", by_alias=True)
        to_json = self._adapter.serializer.to_json
        return [to_json(payload, warnings=False, by_alias=True) for payload in payloads]

    def decode(self, data: bytes) -> Any:
        return self._adapter.validator.validate_json(data)

    def decode_all(self, values: Iterable[bytes | None]) -> list[Any]:
        """As `decode` for each of them; whatever it raises, and for None it does, `decode` says which one it was."""
        return list(map(cast("Callable[[bytes | None], Any]", self._adapter.validator.validate_json), values))

    @cached_property
    def _lists(self) -> TypeAdapter[Any]:
        listed: Any = GenericAlias(list, (self._type,))
        return TypeAdapter(listed)

    def _check(self, payload: Any) -> None:
        # pydantic at most warns about a payload that is not of the declared type, and writes it: the reader of the
        # topic would be the one to find out. It does not even warn about another class with the same fields.
        if self._classes and not isinstance(payload, self._classes):
            raise TypeError(f"expected {' or '.join(one.__name__ for one in self._classes)}")
        if self._required and not self._required <= payload.keys():
            raise TypeError(f"missing: {', '.join(sorted(self._required - payload.keys()))}")


class BytesCodec:
    """The value as it is."""

    content_type = "application/octet-stream"

    def encode(self, payload: Any) -> bytes:
        if not isinstance(payload, bytes):
            raise TypeError(f"expected bytes, not {type(payload).__name__}")
        return payload

    def decode(self, data: bytes) -> bytes:
        return data
