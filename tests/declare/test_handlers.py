"""What the decorators take, what they refuse with file and line, and how the function is called."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Optional, cast

import pytest

from eoframework import App, DeclarationError, HandlerMisuse, Message, Topic, Tx
from eoframework.handlers import Handler
from tests.declare.payloads import AnyOrder, Cancelled, Order, Placed, Refund, record

if TYPE_CHECKING:
    from decimal import Decimal

orders = Topic("orders", Order, id="order_id")
no_tx = cast(Tx, object())


def one(app: App) -> Handler:
    (handler,) = app.handlers
    return handler


def test_the_decorator_returns_the_function_and_declares_a_handler() -> None:
    app = App("stock")

    def reserve(order: Order, tx: Tx) -> None:
        """The user's own."""

    assert app.handler(orders)(reserve) is reserve
    handler = one(app)
    assert (handler.name, handler.group, handler.topic) == ("reserve", "stock.reserve", orders)
    assert (handler.batch, handler.max_batch, handler.start) == (False, None, "earliest")
    assert handler.where == f"{__file__}:{reserve.__code__.co_firstlineno}"


def test_options() -> None:
    app = App("stock")

    @app.batch_handler(orders, name="other", max_batch=7, start="latest")
    def project(batch: list[Order], tx: Tx) -> None: ...

    handler = one(app)
    assert (handler.group, handler.batch, handler.max_batch, handler.start) == ("stock.other", True, 7, "latest")


def test_each_shape_is_called_with_what_it_asks_for() -> None:
    app = App("stock")
    seen: list[tuple[Any, ...]] = []

    @app.handler(orders)
    def payload(order: Order) -> None:
        seen.append((order,))

    @app.handler(orders)
    def payload_tx(order: Order, tx: Tx) -> None:
        seen.append((order, tx))

    @app.handler(orders)
    def message_tx(message: Message[Order], tx: Tx) -> None:
        seen.append((message, tx))

    @app.handler(orders)
    def message_only(message: Message[Order]) -> None:
        seen.append((message,))

    @app.batch_handler(orders)
    def batch(batch: list[Order], tx: Tx) -> None:
        seen.append((batch, tx))

    @app.batch_handler(orders)
    def batch_messages(batch: list[Message[Order]], tx: Tx) -> None:
        seen.append((batch, tx))

    message = orders.decode(record(b'{"order_id": 1}'))
    for handler in app.handlers:
        handler.call_batch([message], no_tx) if handler.batch else handler.call(message, no_tx)
    order = Order(order_id=1)
    assert seen == [
        (order,),
        (order, no_tx),
        (message, no_tx),
        (message,),
        ([order], no_tx),
        ([message], no_tx),
    ]


def test_annotations_that_take_every_payload_are_accepted() -> None:
    app = App("stock")
    events: Topic[Placed | Cancelled] = Topic("events", AnyOrder)
    maybe = Topic("maybe", Order | None)

    class Wide(Order):
        pass

    def anything(o: Any, tx: Tx) -> None: ...
    def wider(o: Order | Refund, tx: Tx) -> None: ...
    def base(o: Order, tx: Tx) -> None: ...
    def bare(m: Message, tx: Tx) -> None: ...
    def members(o: Placed | Cancelled, tx: Tx) -> None: ...
    def annotated(o: AnyOrder, tx: Tx) -> None: ...
    def optional(o: Optional[Order], tx: Tx) -> None: ...  # noqa: UP045 - the old spelling is the point
    def local(m: Message[Wide], tx: Tx) -> None: ...
    def sequence(b: Sequence[Order], tx: Tx) -> None: ...
    def old(o: dict, tx: Tx) -> None: ...  # type: ignore[type-arg]

    pairs: list[tuple[Topic[Any], Callable[..., None]]] = [
        (orders, anything),
        (orders, wider),
        (Topic("wide", Wide), base),
        (orders, bare),
        (events, members),
        (events, annotated),
        (maybe, optional),
        (Topic("wide", Wide), local),
        (Topic("d", dict[str, Any]), old),
    ]
    for topic, function in pairs:
        app.handler(topic)(function)
    app.batch_handler(orders)(sequence)
    assert len(app.handlers) == len(pairs) + 1


def refused() -> list[tuple[str, Callable[[App], object]]]:
    """What is said, and the declaration it is said about."""

    def no_annotation(order, tx: Tx) -> None: ...  # type: ignore[no-untyped-def]
    def wrong_type(order: Refund, tx: Tx) -> None: ...
    def wrong_message(order: Message[Refund], tx: Tx) -> None: ...
    def unknown(order: Nope, tx: Tx) -> None: ...  # type: ignore[name-defined]  # noqa: F821
    def only_checking(order: Order, tx: Tx, extra: Decimal) -> None: ...
    def not_tx(order: Order, tx: Order) -> None: ...
    def bare_tx(order: Order, tx) -> None: ...  # type: ignore[no-untyped-def]
    def three(order: Order, tx: Tx, more: int) -> None: ...
    def none() -> None: ...
    def keywords(*, order: Order) -> None: ...
    def stars(*orders: Order) -> None: ...
    def returns(order: Order, tx: Tx) -> Order:
        return order

    async def asynchronous(order: Order, tx: Tx) -> None: ...
    def generator(order: Order, tx: Tx) -> Iterator[None]:
        yield

    async def async_generator(order: Order, tx: Tx) -> AsyncIterator[None]:
        yield

    def upper(order: Order) -> None: ...
    def single(order: Order, tx: Tx) -> None: ...
    def many(batch: list[Refund], tx: Tx) -> None: ...
    def no_tombstones(order: Order, tx: Tx) -> None: ...
    def one_of_two(order: Placed, tx: Tx) -> None: ...

    both: Topic[Any] = Topic("events", AnyOrder)
    any_orders: Topic[Any] = orders
    return [
        ("parameter 'order' has no annotation.*order: Order", lambda a: a.handler(any_orders)(no_annotation)),
        ("is Refund, but Topic.'orders'. carries Order", lambda a: a.handler(any_orders)(wrong_type)),
        (r"Message\[.*Refund\].* carries Order", lambda a: a.handler(any_orders)(wrong_message)),
        ("cannot be resolved: name 'Nope'", lambda a: a.handler(any_orders)(unknown)),
        ("must take the payload or Message", lambda a: a.handler(any_orders)(only_checking)),
        ("'tx' is not annotated as Tx", lambda a: a.handler(any_orders)(not_tx)),
        ("'tx' is not annotated as Tx", lambda a: a.handler(any_orders)(bare_tx)),
        ("must take the payload or Message", lambda a: a.handler(any_orders)(three)),
        ("must take the payload or Message", lambda a: a.handler(any_orders)(none)),
        ("must take the payload or Message", lambda a: a.handler(any_orders)(keywords)),
        ("must take the payload or Message", lambda a: a.handler(any_orders)(stars)),
        ("it returns something", lambda a: a.handler(any_orders)(returns)),
        ("it is async.*polling thread", lambda a: a.handler(any_orders)(asynchronous)),
        ("it is async", lambda a: a.handler(any_orders)(async_generator)),
        ("it is a generator", lambda a: a.handler(any_orders)(generator)),
        ("the name 'Upper'", lambda a: a.handler(any_orders, name="Upper")(upper)),
        ("the name 'a.b'", lambda a: a.handler(any_orders, name="a.b")(upper)),
        ("the name ''", lambda a: a.handler(any_orders, name="")(upper)),
        ("start='middle'", lambda a: a.handler(any_orders, start=cast(Any, "middle"))(upper)),
        ("max_batch=0", lambda a: a.batch_handler(any_orders, max_batch=0)(many)),
        (r"write `order: list\[Message\[Order\]\]`", lambda a: a.batch_handler(any_orders)(cast(Any, single))),
        ("carries Order", lambda a: a.batch_handler(any_orders)(many)),
        ("carries .*None", lambda a: a.handler(cast(Any, Topic("o", Order | None)))(no_tombstones)),
        ("carries .*Cancelled", lambda a: a.handler(both)(one_of_two)),
    ]


@pytest.mark.parametrize(("message", "declare"), refused())
def test_refused_at_the_declaration_with_file_and_line(message: str, declare: Callable[[App], object]) -> None:
    app = App("stock")
    with pytest.raises(DeclarationError, match=f"(?i){message}") as caught:
        declare(app)
    assert f"{__file__}:" in str(caught.value)
    assert caught.value.remedy
    assert app.handlers == ()


def test_two_handlers_of_one_name_would_share_a_group() -> None:
    app = App("stock")

    @app.handler(orders)
    def reserve(order: Order) -> None: ...

    first = one(app).where
    with pytest.raises(DeclarationError, match=r"second time.*group 'stock\.reserve'") as caught:

        @app.handler(Topic("others", Order), name="reserve")
        def other(order: Order) -> None: ...

    assert first in str(caught.value)
    assert f"{__file__}:" in str(caught.value)


def test_what_is_no_function_is_refused() -> None:
    class Callable_:  # noqa: N801
        def __call__(self, order: Order) -> None: ...

    with pytest.raises(DeclarationError, match="is no handler"):
        App("stock").handler(orders)(Callable_())
    with pytest.raises(DeclarationError, match=f"{__file__}:.* is no Topic"):
        App("stock").handler(cast(Any, "orders"))(lambda order: None)


def test_a_coroutine_that_nobody_awaits_is_no_success() -> None:
    """A wrapped async function looks plain at the declaration. Fails without the check in Handler._run: the message
    would count as processed, and its code has not run.
    """
    app = App("stock")

    async def body(order: Order) -> None:
        raise AssertionError("never runs")

    @app.handler(orders)
    def wrapped(order: Order) -> None:
        return cast(None, body(order))

    with pytest.raises(HandlerMisuse, match="returned a coroutine: its code has not run"):
        one(app).call(orders.decode(record(b'{"order_id": 1}')), no_tx)


def test_the_guarantee_says_what_protects_from_a_producer_s_duplicates() -> None:
    app = App("stock")

    @app.handler(orders)
    def with_id(order: Order) -> None: ...

    @app.handler(Topic("plain", Order))
    def without(order: Order) -> None: ...

    first, second = (handler.describe_guarantee() for handler in app.handlers)
    assert "else from the payload" in first
    assert "position alone" in second


@pytest.mark.parametrize("name", ["", "Shop", "a b", "a" * 101, "ä"])
def test_names_of_apps(name: str) -> None:
    with pytest.raises(DeclarationError, match=f"{__file__}:"):
        App(name)


def test_topics_are_those_of_handlers_and_of_the_modules_that_name_them() -> None:
    elsewhere = Topic("elsewhere", Order)
    app = App("stock", topics=[elsewhere])
    assert set(app.topics) == {elsewhere, orders}
    local = Topic("local", Order)

    @app.handler(local)
    def reserve(order: Order) -> None: ...

    assert set(app.topics) == {elsewhere, orders, local}


def test_the_package_is_light_until_a_name_is_used() -> None:
    """`eo --help` imports it. Fails with plain imports in eoframework/__init__.py."""
    program = (
        "import sys, eoframework; heavy = {'sqlalchemy', 'pydantic', 'confluent_kafka'};"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys();"
        "import eoframework as e; [getattr(e, name) for name in e.__all__]; assert sorted(dir(e)) ;"
        "assert set(e.__all__) == set(e._HOMES)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_declaring_opens_nothing() -> None:
    """Not even the settings are read: a wrong environment is no reason for an import to fail."""
    program = (
        "import socket, os\nos.environ['EO_MAX_BATCH'] = 'wrong'\nsocket.socket.connect = None\n"
        "from eoframework import App, Topic\napp, topic = App('a'), Topic('t', dict)\n"
        "@app.handler(topic)\ndef handle(payload: dict) -> None: ...\n"
        "assert app.handlers and app.topics == (topic,)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
