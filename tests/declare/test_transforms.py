"""What `@app.transform` takes, what it refuses with file and line, and where results go that name no topic."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Optional, TypeVar, cast

import pytest

from eoframework import App, DeclarationError, HandlerMisuse, Message, Out, Retry, Topic, Tx
from eoframework.errors import FailClosed
from eoframework.retry import Breaker
from eoframework.transforms import Transform
from tests.declare.payloads import AnyOrder, Cancelled, Note, Order, Placed, Refund, record

T = TypeVar("T")


class Stock(Order):
    pass


class Pair(NamedTuple):
    a: int
    b: int


orders: Topic[Any] = Topic("orders", Order, key="order_id")
stocks: Topic[Any] = Topic("stocks", Stock)
more_stocks: Topic[Any] = Topic("more_stocks", Stock)
refunds: Topic[Any] = Topic("refunds", Refund)
events: Topic[Any] = Topic("events", AnyOrder)
notes: Topic[Any] = Topic("notes", Note)
documents: Topic[Any] = Topic("documents", dict[str, Any])
numbers: Topic[Any] = Topic("numbers", list[int])
tombs: Topic[Any] = Topic("tombs", Stock | None)
anything: Topic[Any] = Topic("anything", Any)

message = orders.decode(record(b'{"order_id": 1}'))
STOCK = Stock(order_id=1)
REFUND = Refund(order_id=1)


def declared(function: Callable[..., Any], topic: Topic[Any] = orders, **options: Any) -> Transform:
    app = App("stock")
    app.transform(topic, **{"to": stocks} | options)(function)
    (transform,) = app.transforms
    return transform


def test_the_decorator_returns_the_function_and_declares_a_transform() -> None:
    app = App("stock")

    def reserve(order: Order) -> Stock:
        return STOCK

    assert app.transform(orders, to=stocks)(reserve) is reserve
    (transform,) = app.transforms
    assert (transform.name, transform.group, transform.topic) == ("reserve", "stock.reserve", orders)
    assert (transform.targets, transform.batch, transform.takes_messages) == ((stocks,), False, False)
    assert (transform.max_batch, transform.start, transform.policy.ordering) == (None, "earliest", "partition")
    assert transform.where == f"{__file__}:{reserve.__code__.co_firstlineno}"
    assert transform.dead_letter_topic == "stock.reserve.dlt"
    assert app.handlers == ()
    assert app.groups == {"stock.reserve"}


def test_options() -> None:
    def project(batch: list[Order]) -> list[Stock]:
        return []

    transform = declared(project, name="other", start="latest", max_batch=7, retry=None, breaker=None, to=[stocks])
    assert (transform.group, transform.start, transform.max_batch, transform.batch) == (
        "stock.other",
        "latest",
        7,
        True,
    )
    assert (transform.policy.retry, transform.policy.breaker, transform.dead_letter_topic) == (None, None, None)


def test_the_annotation_says_whether_it_takes_one_message_or_a_batch() -> None:
    lists: Topic[Any] = Topic("lists", list[int])

    def payload(order: Order) -> Stock: ...  # type: ignore[empty-body]
    def message(message: Message[Order]) -> Stock: ...  # type: ignore[empty-body]
    def bare(message: Message) -> Stock: ...  # type: ignore[empty-body]
    def whatever(order: Any): ...  # type: ignore[no-untyped-def]
    def payloads(batch: list[Order]) -> list[Stock]: ...  # type: ignore[empty-body]
    def sequence(batch: Sequence[Order]) -> list[Stock]: ...  # type: ignore[empty-body]
    def messages(batch: list[Message[Order]]) -> list[Stock]: ...  # type: ignore[empty-body]
    def one_list(numbers: list[int]) -> Stock: ...  # type: ignore[empty-body]
    def many_lists(numbers: list[list[int]]) -> list[Stock]: ...  # type: ignore[empty-body]

    shapes: list[tuple[Callable[..., Any], Topic[Any], bool, bool]] = [
        (payload, orders, False, False),
        (message, orders, True, False),
        (bare, orders, True, False),
        (whatever, orders, False, False),
        (payloads, orders, False, True),
        (sequence, orders, False, True),
        (messages, orders, True, True),
        (one_list, lists, False, False),
        (many_lists, lists, False, True),
    ]
    for function, topic, takes_messages, batch in shapes:
        found = declared(function, topic)
        assert (found.takes_messages, found.batch) == (takes_messages, batch), function.__name__


def test_annotations_of_what_is_returned_that_fit() -> None:
    both = {stocks, refunds}

    def optional(o: Order) -> Optional[Stock]: ...  # noqa: UP045 - the old spelling is the point
    def either(o: Order) -> Stock | Refund | None: ...
    def many(o: Order) -> list[Stock]: ...  # type: ignore[empty-body]
    def several(o: Order) -> list[Stock | None] | None: ...
    def pair(o: Order) -> tuple[Stock, Refund]: ...  # type: ignore[empty-body]
    def some(o: Order) -> tuple[Stock, ...]: ...  # type: ignore[empty-body]
    def sequence(o: Order) -> Sequence[Refund]: ...  # type: ignore[empty-body]
    def out(o: Order) -> Out[Stock] | Out[Refund]: ...  # type: ignore[empty-body]
    def any_out(o: Order) -> list[Out]: ...  # type: ignore[type-arg, empty-body]
    def unknown(o: Order) -> Any: ...
    def silent(o: Order): ...  # type: ignore[no-untyped-def]
    def bare_list(o: Order) -> list: ...  # type: ignore[type-arg, empty-body]
    def iterator(o: Order) -> Iterator[Stock | Out[Refund]]:
        yield STOCK

    def iterable(o: Order) -> Iterable[Stock]:
        yield STOCK

    def generator(o: Order) -> Generator[Stock, int, None]:
        yield STOCK

    def batch(b: list[Order]) -> list[Stock | None]: ...  # type: ignore[empty-body]
    def batch_of_many(b: list[Order]) -> list[list[Stock | Out[Refund]]]: ...  # type: ignore[empty-body]
    def batch_silent(b: list[Order]) -> list: ...  # type: ignore[type-arg, empty-body]
    def one_of(o: Order) -> Placed: ...  # type: ignore[empty-body]
    def union(o: Order) -> AnyOrder: ...  # type: ignore[empty-body]
    def tomb(o: Order) -> Out[Stock | None]: ...  # type: ignore[empty-body]
    def note(o: Order) -> Note: ...  # type: ignore[empty-body]
    def stock(o: Order) -> Stock: ...  # type: ignore[empty-body]
    def numbered(o: Order) -> Out[list[int]]: ...  # type: ignore[empty-body]

    function: Callable[..., Any]
    for function in (optional, either, many, several, pair, some, sequence, out, any_out, unknown, silent, bare_list):
        declared(function, to=both)
    for function in (iterator, iterable, generator, batch, batch_of_many, batch_silent):
        declared(function, to=both)
    for function, to in ((one_of, events), (union, events), (tomb, tombs), (note, notes), (numbered, numbers)):
        declared(function, to=to)

    class Local(Order):
        pass

    def local(m: Message[Local]) -> list[Local]: ...  # type: ignore[empty-body]

    declared_here = App("stock")
    declared_here.transform(Topic("from", Local), to=Topic("to", Local))(local)
    # The more exact of two that could take it.
    assert declared(stock, to=[anything, stocks]).target_of(STOCK) is stocks


def refused() -> list[tuple[str, Callable[[], object]]]:
    """What is said, and the declaration it is said about."""

    def good(order: Order) -> Stock: ...  # type: ignore[empty-body]
    def batch(batch: list[Order]) -> list[Stock]: ...  # type: ignore[empty-body]
    async def asynchronous(order: Order) -> Stock: ...  # type: ignore[empty-body]
    async def async_generator(order: Order) -> AsyncIterator[Stock]:
        yield STOCK

    def no_annotation(order) -> Stock: ...  # type: ignore[no-untyped-def, empty-body]
    def wrong(order: Refund) -> Stock: ...  # type: ignore[empty-body]
    def wrong_message(order: Message[Refund]) -> Stock: ...  # type: ignore[empty-body]
    def wrong_batch(batch: list[Refund]) -> list[Stock]: ...  # type: ignore[empty-body]
    def unknown(order: Nope) -> Stock: ...  # type: ignore[name-defined, empty-body]  # noqa: F821
    def with_tx(order: Order, tx: Tx) -> Stock: ...  # type: ignore[empty-body]
    def only_tx(tx: Tx) -> Stock: ...  # type: ignore[empty-body]
    def two(order: Order, more: int) -> Stock: ...  # type: ignore[empty-body]
    def none() -> Stock: ...  # type: ignore[empty-body]
    def keywords(*, order: Order) -> Stock: ...  # type: ignore[empty-body]
    def both_ways(batch: list[Any]) -> list[Stock]: ...  # type: ignore[empty-body]

    def returns_none(order: Order) -> None: ...
    def returns_other(order: Order) -> Refund: ...  # type: ignore[empty-body]
    def returns_others(order: Order) -> list[Stock | Refund]: ...  # type: ignore[empty-body]
    def returns_out(order: Order) -> Out[Refund]: ...  # type: ignore[empty-body]
    def returns_tomb(order: Order) -> Out[None]: ...  # type: ignore[empty-body]
    def returns_message(order: Message[Order]) -> Message[Order]: ...  # type: ignore[empty-body]
    def yields_other(order: Order) -> Iterator[Refund]:
        yield REFUND

    def nested(order: Order) -> list[list[Stock]]: ...  # type: ignore[empty-body]
    def list_payload(order: Order) -> list[int]: ...  # type: ignore[empty-body]
    def pair_payload(order: Order) -> Pair: ...  # type: ignore[empty-body]
    def one_for_many(batch: list[Order]) -> Stock: ...  # type: ignore[empty-body]
    def none_for_many(batch: list[Order]) -> None: ...
    def tuple_for_many(batch: list[Order]) -> tuple[Stock, ...]: ...  # type: ignore[empty-body]
    def other_for_many(batch: list[Order]) -> list[Refund]: ...  # type: ignore[empty-body]
    def yields_for_many(batch: list[Order]) -> Iterator[Stock]:
        yield STOCK

    def note(order: Order) -> Note: ...  # type: ignore[empty-body]
    def takes_note(note: Note) -> Stock: ...  # type: ignore[empty-body]

    lists: Topic[Any] = Topic("lists", list[Any])
    any_of: Any = cast(Any, None)
    return [
        ("it is async", lambda: declared(asynchronous)),
        ("it is async", lambda: declared(async_generator)),
        ("'order' has no annotation.*order: Order", lambda: declared(no_annotation)),
        (r"'order' is Refund, but Topic.'orders'. carries Order.*list\[Order\]", lambda: declared(wrong)),
        (r"Message\[.*Refund\], but .* carries Order", lambda: declared(wrong_message)),
        (r"list\[.*Refund\], but .* carries Order", lambda: declared(wrong_batch)),
        ("is Note, but .* carries Order", lambda: declared(takes_note)),
        ("cannot be resolved: name 'Nope'", lambda: declared(unknown)),
        ("has no database transaction.*@app.handler.*outbox", lambda: declared(with_tx)),
        ("has no database transaction", lambda: declared(only_tx)),
        ("must take one thing", lambda: declared(two)),
        ("must take one thing", lambda: declared(none)),
        ("must take one thing", lambda: declared(keywords)),
        ("one message, or a batch.*Say which", lambda: declared(both_ways, lists)),
        ("to='stocks'", lambda: declared(good, to="stocks")),
        ("to=None", lambda: declared(good, to=any_of)),
        ("sends to no topic", lambda: declared(good, to=[])),
        (r"names Topic\('stocks'\) twice", lambda: declared(good, to=[stocks, stocks])),
        ("twice", lambda: declared(good, to={stocks, Topic("stocks", Stock)})),
        (r"reads and sends to Topic\('orders'\)", lambda: declared(good, to=[stocks, orders])),
        ("reads and sends to", lambda: declared(good, to=Topic("orders", Stock))),
        ("dead letters go", lambda: declared(good, to=Topic("stock.good.dlt", Stock))),
        ("dead letters go", lambda: declared(good, Topic("stock.good.dlt", Order))),
        ("the name 'a.b'", lambda: declared(good, name="a.b")),
        ("the name ''", lambda: declared(good, name="")),
        ("start='middle'", lambda: declared(good, start="middle")),
        ("retry=3", lambda: declared(good, retry=3)),
        ("breaker=3", lambda: declared(good, breaker=3)),
        ("max_batch=0", lambda: declared(batch, max_batch=0)),
        ("max_batch=5, but it takes one message", lambda: declared(good, max_batch=5)),
        ("it returns nothing", lambda: declared(returns_none)),
        (r"returns Refund, but Topic\('stocks'\) carries Stock", lambda: declared(returns_other)),
        ("returns Refund, but", lambda: declared(returns_others)),
        (r"returns Out\[Refund\], but", lambda: declared(returns_out)),
        (r"returns Out\[NoneType\], but", lambda: declared(returns_tomb)),
        (r"returns .*Message\[.*\], but", lambda: declared(returns_message)),
        ("returns Refund, but", lambda: declared(yields_other)),
        (r"list\[.*Stock\] inside a list.*Out\(topic, payload\)", lambda: declared(nested)),
        (r"returns int, but .*carries list\[int\].*Out\(topic, payload\)", lambda: declared(list_payload, to=numbers)),
        (r"returns Pair.*Out\(topic", lambda: declared(pair_payload, to=Topic("pairs", Pair))),
        (
            r"Stock, which Topic\('stocks'\) and Topic\('more_stocks'\) carry.*Out\(topic, payload\)",
            lambda: declared(good, to=[stocks, more_stocks]),
        ),
        (
            r"Note, which Topic\('notes'\) and Topic\('documents'\) carry",
            lambda: declared(note, to=[notes, documents]),
        ),
        ("takes a batch and returns Stock.*one entry for each", lambda: declared(one_for_many)),
        ("takes a batch and returns", lambda: declared(none_for_many)),
        ("takes a batch and returns tuple", lambda: declared(tuple_for_many)),
        ("returns Refund, but", lambda: declared(other_for_many)),
        ("a generator that takes a batch", lambda: declared(yields_for_many)),
    ]


@pytest.mark.parametrize(("said", "declare"), refused())
def test_refused_at_the_declaration_with_file_and_line(said: str, declare: Callable[[], object]) -> None:
    with pytest.raises(DeclarationError, match=said) as caught:
        declare()
    assert f"{__file__}:" in str(caught.value)
    assert caught.value.remedy


def test_a_handler_checks_retry_and_breaker_too() -> None:
    def handle(order: Order) -> None: ...

    for options in ({"retry": 3}, {"breaker": 3}):
        with pytest.raises(DeclarationError, match=f"{__file__}:.*=3"):
            App("stock").handler(orders, **cast(Any, options))(handle)
    App("stock").handler(orders, retry=Retry(), breaker=Breaker())(handle)


def test_a_name_belongs_to_one_handler_or_transform() -> None:
    """They would share a group. Fails without App._check_name: the second takes the first one's place."""
    app = App("stock")

    def reserve(order: Order) -> Stock: ...  # type: ignore[empty-body]
    def handle(order: Order) -> None: ...

    app.transform(orders, to=stocks)(reserve)
    app.handler(orders)(handle)
    for declare in (
        lambda: app.handler(orders, name="reserve")(handle),
        lambda: app.transform(orders, to=stocks, name="handle")(reserve),
        lambda: app.transform(orders, to=stocks)(reserve),
    ):
        with pytest.raises(DeclarationError, match=r"second time .first: .*test_transforms.*group 'stock\."):
            declare()
    assert app.groups == {"stock.handle", "stock.reserve"}
    assert len(app.handlers) == len(app.transforms) == 1


def test_what_is_no_function_or_no_topic_is_refused() -> None:
    with pytest.raises(DeclarationError, match="is no transform"):
        declared(cast(Any, "reserve"))
    with pytest.raises(DeclarationError, match=f"{__file__}:.* is no Topic.*transform.topic, to="):
        declared(lambda order: None, cast(Any, "orders"))


def test_its_topics_are_the_app_s() -> None:
    app = App("stock")
    target = Topic("only-here", Stock)

    @app.transform(orders, to={target})
    def reserve(order: Order) -> Stock: ...  # type: ignore[empty-body]

    assert {orders, target} <= set(app.topics)


def test_several_topics_have_one_order_in_all_processes() -> None:
    def reserve(order: Order) -> Stock: ...  # type: ignore[empty-body]

    assert declared(reserve, to={stocks, refunds, notes}).targets == (notes, refunds, stocks)
    assert declared(reserve, to=[stocks, refunds]).targets == (stocks, refunds)
    assert "to refunds, stocks" in declared(reserve, to={stocks, refunds}).describe_guarantee()
    assert "duplicates count" in declared(reserve).describe_guarantee()


# --- calling ---


def called(transform: Transform) -> list[Any]:
    """What it makes of `message`, called as the worker calls it."""
    return transform.results(transform.function(message if transform.takes_messages else message.payload))


def called_with_two(transform: Transform) -> list[list[Any]]:
    given = message if transform.takes_messages else message.payload
    return [transform.results(one) for one in transform.call_batch([given, given])]


def results(returned: Any, **options: Any) -> list[Any]:
    def function(order: Order):  # type: ignore[no-untyped-def]
        return returned

    return called(declared(function, **options))


def test_whatever_holds_results_is_taken_apart() -> None:
    out = Out(stocks, STOCK)
    assert results(None) == []
    assert results(STOCK) == [STOCK]
    assert results(out) == [out]
    assert results([STOCK, None, out]) == [STOCK, out]
    assert results((STOCK, out)) == [STOCK, out]
    assert results(iter([STOCK, None])) == [STOCK]
    assert results(reversed([STOCK])) == [STOCK]
    assert results({"a": 1}, to=documents) == [{"a": 1}]

    def yields(order: Order) -> Iterator[Stock]:
        yield STOCK
        yield STOCK

    assert called(declared(yields)) == [STOCK, STOCK]


def test_it_is_called_with_what_it_asks_for() -> None:
    seen: list[Any] = []

    def payload(order: Order):  # type: ignore[no-untyped-def]
        seen.append(order)

    def whole(message: Message[Order]):  # type: ignore[no-untyped-def]
        seen.append(message)

    def batch(batch: list[Order]) -> list[Any]:
        seen.append(batch)
        return [None, [STOCK, None]]

    def batch_of_messages(batch: list[Message[Order]]) -> list[Any]:
        seen.append(batch)
        return [STOCK, Out(stocks, STOCK)]

    called(declared(payload))
    called(declared(whole))
    assert called_with_two(declared(batch)) == [[], [STOCK]]
    assert called_with_two(declared(batch_of_messages)) == [[STOCK], [Out(stocks, STOCK)]]
    assert seen == [message.payload, message, [message.payload] * 2, [message] * 2]


def test_a_batch_needs_one_entry_for_each_message() -> None:
    for returned in ([STOCK], [STOCK] * 3, (STOCK, STOCK), None, STOCK):

        def batch(batch: list[Order]) -> Any:
            return returned  # noqa: B023 - called in this round

        with pytest.raises(FailClosed, match=r"for 2 messages.*one entry for each"):
            called_with_two(declared(batch))


def test_code_that_has_not_run_is_no_result() -> None:
    """Fails without Transform._not_run: the coroutine would be encoded, or taken for nothing."""

    async def body(order: Order) -> Stock:
        raise AssertionError("never runs")

    async def stream(order: Order) -> AsyncIterator[Stock]:
        yield STOCK

    for unfinished in (body, stream):

        def wrapped(order: Order) -> Any:
            return unfinished(order)  # noqa: B023 - called in this round

        with pytest.raises(HandlerMisuse, match="its code has not run"):
            called(declared(wrapped))


def test_what_a_generator_returns_at_its_end_is_not_lost_silently() -> None:
    """Fails with a plain list(generator) in Transform._drawn: the stock is dropped without a word."""

    def yields(order: Order) -> Generator[Stock, None, Stock]:
        yield STOCK
        return STOCK

    with pytest.raises(HandlerMisuse, match=r"a Stock that nobody would get.*Yield it"):
        called(declared(yields))


# --- where results go ---


class Child(Stock):
    pass


def test_a_payload_goes_where_its_class_is_carried() -> None:
    def silent(order: Order): ...  # type: ignore[no-untyped-def]

    alone = declared(silent)
    assert alone.target_of(STOCK) is stocks
    # The codec judges, and refuses in the words of the topic.
    assert alone.target_of(REFUND) is stocks

    several = declared(silent, to=[stocks, refunds, events, documents])
    assert several.target_of(STOCK) is stocks
    assert several.target_of(Child(order_id=1)) is stocks
    assert several.target_of(REFUND) is refunds
    assert several.target_of(Placed(order_id=1)) is several.target_of(Cancelled(order_id=1, why="")) is events
    assert several.target_of({"a": 1}) is documents
    assert declared(silent, to=[stocks, anything]).target_of("text") is anything
    assert declared(silent, to=tombs).target_of(STOCK) is tombs


def test_where_a_payload_goes_is_never_guessed() -> None:
    """Each fails with the first topic taken instead of Routes.find returning None."""

    def silent(order: Order): ...  # type: ignore[no-untyped-def]

    cases: list[tuple[Any, Any, str]] = [
        ([stocks, more_stocks], STOCK, "not known where a Stock goes: .*stocks.*more_stocks.*Out.topic, payload"),
        ([stocks, more_stocks], Child(order_id=1), "not known where a Child goes"),
        ([stocks, more_stocks, anything], STOCK, "not known where a Stock goes"),
        ([stocks, refunds], "text", "not known where a str goes"),
        ([notes, documents], {"order_id": 1, "text": ""}, "not known where a dict goes"),
        ([numbers], [1, 2], "a list among its results is read as several.*Out"),
        ([numbers], 1, "not known where a int goes"),
        ([Topic("pairs", Pair)], Pair(1, 2), "a Pair among its results"),
        ([tombs], None, "None is no payload.*tombstone say Out"),
    ]
    for to, payload, said in cases:
        with pytest.raises(HandlerMisuse, match=said) as caught:
            declared(silent, to=to).target_of(payload)
        assert f"stock.silent ({__file__}:" in str(caught.value)
