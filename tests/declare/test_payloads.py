"""Payloads become bytes and back, and what cannot is refused: at the declaration, at the call, or for one record."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eoframework import DeclarationError, DecodeError, EncodeError, Topic
from tests.declare.payloads import AnyOrder, Camel, Cancelled, Note, Order, Placed, Refund, record

ROUND_TRIPS: list[tuple[Any, Any, str]] = [
    (Order, Order(order_id=1), "Order"),
    (Refund, Refund(order_id=1, amount=2.5), "Refund"),
    (Note, {"order_id": 1, "text": "ü"}, "Note"),
    (dict, {"a": [1, None, "x"]}, "orders"),
    (dict[str, int], {"a": 1}, "orders"),
    (bytes, b"\x00\xff", "orders"),
    (bytes, b"", "orders"),
    (AnyOrder, Cancelled(order_id=1, why="late"), "Cancelled"),
    (AnyOrder, Placed(order_id=1), "Placed"),
    (Order | None, Order(order_id=1), "Order"),
    (str, "text", "orders"),
]


@pytest.mark.parametrize(("payload_type", "payload", "name"), ROUND_TRIPS)
def test_round_trip(payload_type: Any, payload: Any, name: str) -> None:
    topic: Topic[Any] = Topic("orders", payload_type)
    message = topic.encode(payload, source="shop")
    assert topic.decode(record(message.payload)).payload == payload
    assert (message.type, message.source, message.topic) == (name, "shop", "orders")


def test_aliases_are_what_stands_in_kafka() -> None:
    """Fails without by_alias=True in codec.py: our own reader would not know the field."""
    topic = Topic("orders", Camel, key="order_id")
    message = topic.encode(Camel(orderId=1), source="s")
    assert (message.payload, message.key) == (b'{"orderId":1}', b"1")
    assert topic.decode(record(message.payload)).payload == Camel(orderId=1)


def test_content_types() -> None:
    assert Topic("t", Order).encode(Order(order_id=1), source="s").content_type == "application/json"
    assert Topic("t", bytes).encode(b"x", source="s").content_type == "application/octet-stream"


@pytest.mark.parametrize(
    ("payload_type", "payload"),
    [
        (Order, {"order_id": 1}),
        (Order, Refund(order_id=1)),
        (Order, Order.model_construct(order_id="one")),
        (Refund, Refund(order_id="one")),  # type: ignore[arg-type]
        (Note, {"order_id": 1}),
        (Note, {"order_id": "one", "text": "x"}),
        (dict[str, int], {"a": "x"}),
        (dict, {"a": object()}),
        (dict, [1]),
        (bytes, "text"),
        (bytes, bytearray(b"x")),
        (AnyOrder, Order(order_id=1)),
        (Order, None),
        (str, "\ud800"),
    ],
)
def test_a_payload_of_another_type_is_refused_at_the_call(payload_type: Any, payload: Any) -> None:
    """Fails without warnings="error" in codec.py: pydantic writes it, and the topic's readers find out."""
    topic: Topic[Any] = Topic("orders", payload_type)
    with pytest.raises(EncodeError, match="orders: "):
        topic.encode(payload, source="s")


@pytest.mark.parametrize(
    ("payload_type", "value"),
    [
        (Order, b""),
        (Order, b"\xff\xfe"),
        (Order, b"null"),
        (Order, b"{"),
        (Order, b'{"order_id": "one"}'),
        (Order, b"[" * 100_000),
        (AnyOrder, b'{"kind": "shipped"}'),
        (dict, b"1"),
        (Order, None),
        (bytes, None),
    ],
)
def test_bytes_that_are_no_payload_fail_with_the_record_s_place(payload_type: Any, value: bytes | None) -> None:
    topic: Topic[Any] = Topic("orders", payload_type)
    with pytest.raises(DecodeError, match=r"orders\[3\]@42"):
        topic.decode(record(value))


def test_a_decode_error_shows_no_values_of_the_payload() -> None:
    """It ends in logs."""
    with pytest.raises(DecodeError) as caught:
        Topic("orders", Order).decode(record(b'{"order_id": "4111-1111-1111-1111"}'))
    assert "4111" not in str(caught.value)
    assert "order_id" in str(caught.value)


def test_tombstones() -> None:
    topic = Topic("orders", Order | None, key="order_id")
    assert topic.decode(record(None)).payload is None
    message = topic.encode(None, source="s", key=7)
    assert (message.payload, message.key) == (None, b"7")
    with pytest.raises(EncodeError, match="tombstone without a key"):
        topic.encode(None, source="s")


@given(st.binary(max_size=200))
def test_any_bytes_either_decode_or_fail_with_a_decode_error(value: bytes) -> None:
    kinds: list[Any] = [Order, AnyOrder, dict, Note]
    for payload_type in kinds:
        topic: Topic[Any] = Topic("orders", payload_type)
        with contextlib.suppress(DecodeError):
            topic.decode(record(value))


class Shouting:
    """A codec of the user's own."""

    content_type = "text/shout"

    def encode(self, payload: str) -> bytes:
        return payload.upper().encode()

    def decode(self, data: bytes) -> str:
        return data.decode().lower()


def test_a_codec_of_the_user_s_own() -> None:
    topic = Topic("orders", str, codec=Shouting())
    message = topic.encode("hey", source="s")
    assert (message.payload, message.content_type) == (b"HEY", "text/shout")
    assert topic.decode(record(b"HEY")).payload == "hey"
    with pytest.raises(DecodeError, match="UnicodeDecodeError"):
        topic.decode(record(b"\xff"))


def test_a_codec_that_returns_no_bytes_is_refused() -> None:
    class Wrong(Shouting):
        def encode(self, payload: str) -> Any:
            return payload

    with pytest.raises(EncodeError, match="returned str"):
        Topic("orders", str, codec=Wrong()).encode("x", source="s")


def test_a_message_too_large_names_size_limit_and_remedies() -> None:
    with pytest.raises(EncodeError, match=r"1000\d{3} bytes .* allowed are 1000000.*max_bytes.*EO_KAFKA_MESSAGE_MAX"):
        Topic("orders", bytes).encode(bytes(999_700), source="s")
    assert Topic("orders", bytes).encode(bytes(999_000), source="s").payload
    assert Topic("orders", bytes, max_bytes=3_000_000).encode(bytes(2_000_000), source="s").payload
    with pytest.raises(EncodeError, match="allowed are"):
        Topic("orders", bytes).encode(bytes(980_000), source="s", headers={"h": bytes(30_000)})


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        (0, datetime(1970, 1, 1, tzinfo=UTC)),
        (1500, datetime(1970, 1, 1, 0, 0, 1, 500_000, UTC)),
        (-1, None),
        (2**62, None),
    ],
)
def test_timestamps_that_no_calendar_holds_are_absent(milliseconds: int, expected: datetime | None) -> None:
    assert Topic("orders", bytes).decode(record(b"", timestamp=milliseconds)).timestamp == expected


class Plain:
    """Nothing that pydantic could write."""


def test_wrong_topics_are_refused_where_they_are_declared() -> None:
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: Topic("orders", Plain), "cannot be written as JSON"),
        (lambda: Topic("or ders", Order), "topic name"),
        (lambda: Topic("", Order), "topic name"),
        (lambda: Topic("..", Order), "topic name"),
        (lambda: Topic("o" * 250, Order), "topic name"),
        (lambda: Topic("orders", Order, key="nope"), "key='nope' is no field"),
        (lambda: Topic("orders", Order, id="nope"), "id='nope' is no field"),
        (lambda: Topic("orders", Refund, key="nope"), "is no field"),
        (lambda: Topic("orders", Note, key="nope"), "is no field"),
        (lambda: Topic("orders", AnyOrder, key="why"), "is no field"),
        (lambda: Topic("orders", bytes, key="order_id"), "is no field"),
        (lambda: Topic("orders", Order, partitions=0), "partitions=0"),
        (lambda: Topic("orders", Order, max_bytes=0), "max_bytes=0"),
        (lambda: Topic("orders", type(None)), "only None"),
        (lambda: Topic("orders", bytes | Order), "bytes cannot be one of several"),
    ]
    for declare, message in wrong:
        with pytest.raises(DeclarationError, match=message) as caught:
            declare()
        assert f"{__file__}:" in str(caught.value)
        assert caught.value.remedy


def test_fields_of_every_kind_of_payload() -> None:
    """The id is spelled out: it must be the same in every release, or duplicates across an upgrade count twice."""
    expected = uuid5(uuid5(UUID("5f1cbd0e-8f0f-5ea5-9d9c-0e0f00000001"), "orders"), "1")
    kinds: list[tuple[Any, Any]] = [
        (Order, Order(order_id=1)),
        (Refund, Refund(order_id=1)),
        (Note, {"order_id": 1, "text": ""}),
        (dict, {"order_id": 1}),
        (AnyOrder, Placed(order_id=1)),
        (Order | None, Order(order_id=1)),
    ]
    for payload_type, payload in kinds:
        topic: Topic[Any] = Topic("orders", payload_type, key="order_id", id="order_id")
        message = topic.encode(payload, source="s")
        assert (message.key, message.id) == (b"1", expected)
