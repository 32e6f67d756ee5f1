"""External(...) and external=[...]: what is refused, with file and line, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest

from eoframework import App, DeclarationError, External, ExternalCall, Message, Topic, Tx
from eoframework.handlers import declare
from tests.failure.calls import Order, orders


def good(message: Message[Order], call: ExternalCall) -> dict[str, int]:
    return {}


def declare_with(*external: External, topic: Topic[Any] = orders) -> App:
    app = App("shop")

    @app.handler(topic, external=external)
    def pay(message: Message, tx: Tx) -> None: ...

    return app


class Payments:
    def charge(self, message: Message[Order], call: ExternalCall) -> int:
        return 1

    def __call__(self, message: Message[Order], call: ExternalCall) -> int:
        return 1


@pytest.mark.parametrize(
    "function",
    [good, Payments().charge, Payments(), partial(good), lambda message, call: None],
    ids=["function", "method", "object", "partial", "lambda"],
)
def test_what_can_be_called(function: Callable[..., object]) -> None:
    (handler,) = declare_with(External("charge", function)).handlers
    assert [external.name for external in handler.external] == ["charge"]


def test_the_default_never_calls_twice_by_itself() -> None:
    assert External("charge", good).unresolved == "ask"


async def asynchronous(message: Message[Order], call: ExternalCall) -> None: ...


def one(message: Message[Order]) -> None: ...


def named(message: Message[Order], *, call: ExternalCall) -> None: ...


def payload(order: Order, call: ExternalCall) -> None: ...


def other(message: Message[int], call: ExternalCall) -> None: ...


def wrong_call(message: Message[Order], call: Tx) -> None: ...


@pytest.mark.parametrize("function", [asynchronous, one, named, payload, other, wrong_call])
def test_functions_that_cannot_be_called(function: Any) -> None:
    with pytest.raises(DeclarationError, match=r"External\('charge'\)") as raised:
        declare_with(External("charge", function))
    assert f"{__file__}:{function.__code__.co_firstlineno}: " in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [{"name": "Charge!"}, {"name": ""}, {"unresolved": "hope"}, {"lease": 0}, {"lease": 1e9}, {"lease": float("nan")}],
)
def test_values(options: dict[str, Any]) -> None:
    with pytest.raises(DeclarationError, match=rf"{__file__}:\d+: External"):
        External(**{"name": "charge", "function": good, **options})


def test_what_is_no_function() -> None:
    with pytest.raises(DeclarationError, match=rf"{__file__}:\d+: External\('charge'\): 5 cannot be called"):
        declare_with(External("charge", cast(Any, 5)))


def test_names_are_unique_in_a_handler() -> None:
    with pytest.raises(DeclarationError, match="two external calls are named 'charge'"):
        declare_with(External("charge", good), External("charge", good))


def test_only_externals() -> None:
    with pytest.raises(DeclarationError, match=r"Give a list of External\(name, function\)"):
        declare_with(cast(External, good))


def test_not_on_batch_handlers() -> None:
    def pay(batch: list[Order], tx: Tx) -> None: ...

    with pytest.raises(DeclarationError, match=rf"{__file__}:\d+: handler pay: external=... on a batch handler"):
        declare(pay, orders, app_name="shop", name=None, batch=True, external=[External("charge", good)])
    with pytest.raises(TypeError, match="external"):
        App("shop").batch_handler(orders, external=[External("charge", good)])  # type: ignore[call-arg]
