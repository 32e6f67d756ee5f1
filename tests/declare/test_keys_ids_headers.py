"""Keys, message ids and headers: what goes out, what is read, and which ids make two messages one."""

from __future__ import annotations

import enum
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eoframework import DecodeError, EncodeError, Topic
from eoframework.clock import now
from eoframework.cloudevents import incoming_id, outgoing_headers
from eoframework.message import Headers
from tests.declare.payloads import Order, record

U = UUID("0190b2c4-7a51-7000-8000-0123456789ab")
anything: Topic[dict[str, Any]] = Topic("orders", dict[str, Any], key=lambda p: p.get("k"), id=lambda p: p.get("i"))


class Colour(enum.StrEnum):
    RED = "r"


class Level(enum.IntEnum):
    HIGH = 3


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("ä", "ä".encode()),
        (b"\xff\x00", b"\xff\x00"),
        (-7, b"-7"),
        (U, str(U).encode()),
        (None, None),
        ("", b""),
        (Colour.RED, b"r"),
        (Level.HIGH, b"3"),
    ],
)
def test_keys(key: Any, expected: bytes | None) -> None:
    assert anything.encode({}, source="s", key=key).key == expected
    plain: Topic[dict[str, Any]] = Topic("orders", dict[str, Any], key=lambda _: key)
    assert plain.encode({}, source="s").key == expected


@pytest.mark.parametrize("key", [1.5, True, object(), ("a",), datetime.now, "\ud800"])
def test_a_key_without_an_agreed_form_is_refused(key: Any) -> None:
    with pytest.raises(EncodeError, match=r"orders: (a|the) key"):
        anything.encode({}, source="s", key=key)


def test_a_key_given_wins_over_the_topic_s() -> None:
    assert anything.encode({"k": "topic"}, source="s", key="given").key == b"given"
    assert anything.encode({"k": "topic"}, source="s").key == b"topic"


def test_a_payload_without_the_field_is_refused() -> None:
    topic = Topic("orders", dict[str, str], key="k")
    with pytest.raises(EncodeError, match="key cannot be read: KeyError"):
        topic.encode({"a": "b"}, source="s")


def test_the_id_is_the_given_one_else_the_payload_s_else_the_default_else_a_new_one() -> None:
    default = uuid4()
    assert anything.encode({"i": "x"}, source="s", id=U, default_id=default).id == U
    assert anything.encode({"i": "x"}, source="s", id=str(U).upper(), default_id=default).id == U
    from_payload = anything.encode({"i": "x"}, source="s", default_id=default).id
    assert from_payload == anything.encode({"i": "x"}, source="other").id != default
    assert anything.encode({}, source="s", default_id=default).id == default
    new = anything.encode({}, source="s").id
    assert new.version == 7
    assert new != anything.encode({}, source="s").id


def test_an_id_of_the_payload_counts_within_its_topic() -> None:
    other: Topic[dict[str, Any]] = Topic("refunds", dict[str, Any], id="i")
    assert anything.encode({"i": 5}, source="s").id != other.encode({"i": 5}, source="s").id


@pytest.mark.parametrize("given_id", ["", "x" * 1025, 1.5, True])
def test_ids_that_are_none_are_refused(given_id: Any) -> None:
    with pytest.raises(EncodeError, match="id"):
        anything.encode({}, source="s", id=given_id)


def test_what_we_write_is_read_with_the_id_it_was_given() -> None:
    message = anything.encode({}, source="shop", id=U, headers={"tenant": "a"})
    headers = _outgoing(message.headers)
    assert dict(headers) == {
        "ce_specversion": b"1.0",
        "ce_id": str(U).encode(),
        "ce_source": b"shop",
        "ce_type": b"Order",
        "ce_time": b"2024-05-01T10:00:00+00:00",
        "content-type": b"application/json",
        "message-id": str(U).encode(),
        "tenant": b"a",
    }
    assert incoming_id(tuple(headers), topic="orders") == U


def test_a_trace_goes_along_unless_the_publisher_gave_its_own() -> None:
    assert dict(_outgoing((), traceparent="00-a"))["traceparent"] == b"00-a"
    own = [value for name, value in _outgoing((("traceparent", b"00-b"),), traceparent="00-a") if name == "traceparent"]
    assert own == [b"00-b"]


def test_two_sources_with_the_same_event_id_are_two_messages() -> None:
    """Also when both use the same UUID, the one of the order they speak of. Taking ce_id alone loses one silently.

    Fails when `incoming_id` leaves the source out.
    """
    for event_id in (b"1", str(U).encode()):
        first = incoming_id((("ce_id", event_id), ("ce_source", b"/a")), topic="orders")
        second = incoming_id((("ce_id", event_id), ("ce_source", b"/b")), topic="orders")
        assert first is not None
        assert first != second
        assert first == incoming_id((("ce_source", b"/a"), ("ce_id", event_id)), topic="orders")


def test_source_and_id_do_not_run_into_each_other() -> None:
    first = incoming_id((("ce_id", b"2a"), ("ce_source", b"1")), topic="orders")
    assert first != incoming_id((("ce_id", b"a"), ("ce_source", b"12")), topic="orders")


@pytest.mark.parametrize("text", ["{" + str(U) + "}", f"urn:uuid:{U}", U.hex, "not a uuid", "1", "ü"])
def test_ids_that_are_no_canonical_uuid_are_folded_into_the_topic(text: str) -> None:
    headers: Headers = (("message-id", text.encode()),)
    found = incoming_id(headers, topic="orders")
    assert found not in (None, U)
    assert found == incoming_id(headers, topic="orders") != incoming_id(headers, topic="refunds")


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("message-id", None),),
        (("message-id", b""),),
        (("message-id", b"\xff"),),
        (("message-id", b"x" * 1025),),
        (("ce_id", b"1"),),
        (("ce_id", b"1"), ("ce_source", b"\xff")),
        (("ce_id", b"1"), ("ce_source", b"x" * 100_000)),
        (*((f"h{n}", b"x") for n in range(5000)), ("message-id", b"1")),
    ],
)
def test_hostile_headers_count_as_absent(headers: Headers) -> None:
    assert incoming_id(headers, topic="orders") is None
    message = anything.decode(record(b'{"i": 5}', headers=headers))
    assert message.id == anything.encode({"i": 5}, source="s").id
    assert message.headers is headers


@given(
    st.lists(st.tuples(st.sampled_from(["ce_id", "ce_source", "message-id", "x"]), st.none() | st.binary(max_size=50)))
)
def test_reading_an_id_never_raises_and_is_stable(headers: list[tuple[str, bytes | None]]) -> None:
    found = incoming_id(tuple(headers), topic="orders")
    assert found == incoming_id(tuple(headers), topic="orders")


def test_a_payload_without_an_id_has_none_and_a_wrong_one_fails_the_record() -> None:
    by_name: Topic[dict[str, Any]] = Topic("orders", dict[str, Any], id="i")
    assert by_name.decode(record(b"{}")).id is None
    assert by_name.decode(record(b'{"i": null}')).id is None
    with pytest.raises(DecodeError, match="gave no id"):
        by_name.decode(record(b'{"i": 1.5}'))
    broken: Topic[Order] = Topic("orders", Order, id=lambda o: o.sku[99])
    with pytest.raises(DecodeError, match="id= failed: IndexError"):
        broken.decode(record(b'{"order_id": 1}'))


@pytest.mark.parametrize("name", ["ce_id", "CE_Source", "ce_anything", "message-id", "Content-Type"])
def test_headers_that_are_ours_cannot_be_overridden(name: str) -> None:
    with pytest.raises(EncodeError, match="written by eoframework"):
        anything.encode({}, source="s", headers={name: "x"})


@pytest.mark.parametrize(
    "headers",
    [
        {"": "x"},
        {"n" * 256: "x"},
        {"\x00": "x"},
        {"\ud800": "x"},
        {"n": None},
        {"n": 5},
        {"n": "\ud800"},
        {"n": b"x" * 70_000},
        {f"n{n}": "x" for n in range(101)},
    ],
)
def test_headers_that_would_fail_later_are_refused_at_the_call(headers: Any) -> None:
    with pytest.raises(EncodeError, match="header"):
        anything.encode({}, source="s", headers=headers)


def test_times() -> None:
    before = now()
    due = anything.encode({}, source="s", delay=60).deliver_at
    assert due is not None
    assert timedelta(seconds=60) <= due - before < timedelta(seconds=70)
    east = datetime(2024, 5, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    assert anything.encode({}, source="s", deliver_at=east).deliver_at == datetime(2024, 5, 1, 10, tzinfo=UTC)
    assert anything.encode({}, source="s", delay=0).deliver_at is None
    assert anything.encode({}, source="s", delay=timedelta(0)).deliver_at is None


@pytest.mark.parametrize(
    "times",
    [
        {"delay": -1},
        {"delay": float("nan")},
        {"delay": float("inf")},
        {"delay": timedelta.max},
        {"deliver_at": datetime(2024, 1, 1)},
        {"deliver_at": datetime(2024, 1, 1, tzinfo=UTC), "delay": 1},
    ],
)
def test_times_that_are_none_are_refused(times: dict[str, Any]) -> None:
    with pytest.raises(EncodeError, match=r"orders: (delay|deliver_at)"):
        anything.encode({}, source="s", **times)


def _outgoing(headers: Headers, traceparent: str | None = None) -> list[tuple[str, bytes | None]]:
    return outgoing_headers(
        id=U,
        source="shop",
        type="Order",
        time=datetime(2024, 5, 1, 12, tzinfo=timezone(timedelta(hours=2))),
        content_type="application/json",
        headers=headers,
        traceparent=traceparent,
    )
