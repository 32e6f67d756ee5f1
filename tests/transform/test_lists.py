"""What is made of a list is what would be made of each of its messages by itself."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from eoframework import App, EncodeError, Out, Topic
from eoframework.codec import JsonCodec
from eoframework.db.position import Stream
from eoframework.kafka.producer import Outgoing
from eoframework.message import Record
from eoframework.settings import Settings
from eoframework.transform.outputs import Outputs

TRACE = b"00-%032x-%016x-01" % (7, 8)


class Order(BaseModel):
    number: int
    account: str = Field(alias="for")


class Other(BaseModel):
    name: str


@dataclass
class Line:
    number: int


class Keyed(TypedDict):
    number: int


orders = Topic("orders", Order)
SOURCE = Topic("source", Other)


def order(number: int, account: str = "a") -> Order:
    return Order.model_validate({"number": number, "for": account})


def outputs(*targets: Topic[Any]) -> Outputs:
    app = App("lists", settings=Settings())

    def make(batch: list[Other]) -> list[Any]:
        return [*batch]

    app.transform(SOURCE, to={*targets}, name="make")(make)
    made = Outputs(app.transforms[0], Stream(1, "lists.make", "source", uuid.UUID(int=9), "c"), source="lists")
    made.begin()
    return made


def records(count: int, *, key: bytes | None = b"k") -> list[Record]:
    headers = [(), (("ce_id", b"x"), ("traceparent", TRACE)), (("TraceParent", TRACE),), (("traceparent", b"none"),)]
    return [Record("source", n % 2, 250 + n, key, b"{}", headers[n % 4], n // 3) for n in range(count)]


def one_by_one(made: Outputs, given: list[Record], returned: list[Any]) -> list[list[Outgoing]]:
    return [made.of(record, one) for record, one in zip(given, returned, strict=True)]


@pytest.mark.parametrize(
    ("target", "payloads"),
    [
        pytest.param(orders, [order(n, f"ä{n}") for n in range(12)], id="models with an alias"),
        pytest.param(Topic("t", Order, key="account"), [order(n) for n in range(12)], id="keys"),
        pytest.param(
            Topic("t", Order, key=lambda one: one.number or None), [order(n % 2) for n in range(12)], id="some"
        ),
        pytest.param(Topic("t", Order, id="number"), [order(n) for n in range(12)], id="ids of its own"),
        pytest.param(Topic("t", Line), [Line(n) for n in range(12)], id="dataclasses"),
        pytest.param(Topic("t", Keyed), [Keyed(number=n) for n in range(12)], id="typed dicts"),
        pytest.param(Topic("t", bytes), [b"%d" % n for n in range(12)], id="bytes"),
        pytest.param(orders, [[order(n)] if n % 2 else None for n in range(12)], id="none and many"),
        pytest.param(orders, [order(1), Out(orders, order(2), headers={"x": "y"}), *[order(3)] * 10], id="out"),
        pytest.param(Topic("t", Order | Other), [Other(name="o"), *[order(3)] * 11], id="two classes"),
        pytest.param(orders, [], id="nothing"),
    ],
)
@pytest.mark.parametrize("key", [b"k", None])
def test_as_one_by_one(target: Topic[Any], payloads: list[Any], key: bytes | None) -> None:
    """Seen to fail with the record's own key left out of `_alike`, with `derives_id` not asked, and with `by_alias`
    left out of encode_all.
    """
    made, given = outputs(target), records(len(payloads), key=key)
    assert made.of_list(given, payloads) == one_by_one(made, given, payloads)


def test_one_that_cannot_be_written_is_refused_with_the_list() -> None:
    """Seen to fail with the list not asked for errors in encode_all: the topic's reader would find out."""
    wrong = Order.model_construct(number="seven", account="a")
    with pytest.raises(EncodeError, match="orders: a Order cannot be written"):
        outputs(orders).of_list(records(3), [order(1), wrong, order(2)])


def test_one_that_is_too_large_is_refused() -> None:
    """Seen to fail with the size not looked at in `_alike`: the broker would refuse the whole transaction."""
    small = Topic("small", Order, max_bytes=700)
    with pytest.raises(EncodeError, match="allowed are 700"):
        outputs(small).of_list(records(2), [order(1), order(2, "x" * 700)])


def test_all_payloads_of_a_list_are_read_as_each_of_them() -> None:
    given = [Record("orders", 0, n, None, b'{"number": %d, "for": "a"}' % n, (), 0) for n in range(3)]
    assert (
        orders.decode_payloads(given) == [orders.decode_payload(one) for one in given] == [order(n) for n in range(3)]
    )
    assert orders.decode_payloads([*given, given[0]._replace(value=b"{}")]) is None
    assert orders.decode_payloads([*given, given[0]._replace(value=None)]) is None


def test_a_subclass_of_another_payload_type_is_no_payload() -> None:
    with pytest.raises(TypeError, match="expected Order"):
        JsonCodec(Order).encode_all([order(1), Other(name="o")])
