"""What `@app.handler(...)` and its like are to a type checker: which functions they take and give back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypedDict, Union, overload

from typing_extensions import TypeVar

from eoframework.message import Message
from eoframework.retry import Breaker, Retry
from eoframework.signatures import Start
from eoframework.transforms import Out

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

Result = Union[None, R, Out[Any], Sequence[Union[R, Out[Any], None]], Iterator[Union[R, Out[Any], None]]]  # noqa: UP007 - mypy reads a generic alias so
"""What a transform makes of one message."""


class TransformOptions(TypedDict, total=False):
    """The options of `@app.transform`, for its overloads."""

    name: str | None
    start: Start
    max_batch: int | None
    retry: Retry | None
    breaker: Breaker | None


class HandlerDecorator(Generic[T]):
    """`@app.handler(topic)`: takes a function of the topic's payload or Message, returns it unchanged."""

    def __init__(self, register: Callable[[Callable[..., object]], None]) -> None:
        self._register = register

    @overload
    def __call__(
        self, function: Callable[Concatenate[Message[T], P], None]
    ) -> Callable[Concatenate[Message[T], P], None]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[T, P], None]) -> Callable[Concatenate[T, P], None]: ...
    def __call__(self, function: Callable[..., None]) -> Callable[..., None]:
        self._register(function)
        return function


class BatchHandlerDecorator(Generic[T]):
    """`@app.batch_handler(topic)`: takes a function of a list of payloads or Messages, returns it unchanged."""

    def __init__(self, register: Callable[[Callable[..., object]], None]) -> None:
        self._register = register

    @overload
    def __call__(
        self, function: Callable[Concatenate[list[Message[T]], P], None]
    ) -> Callable[Concatenate[list[Message[T]], P], None]: ...
    @overload
    def __call__(
        self, function: Callable[Concatenate[list[T], P], None]
    ) -> Callable[Concatenate[list[T], P], None]: ...
    def __call__(self, function: Callable[..., None]) -> Callable[..., None]:
        self._register(function)
        return function


class TransformDecorator(Generic[T, R]):
    """`@app.transform(source, to=...)`: takes a function of one payload or Message, or of a list of them."""

    def __init__(self, register: Callable[[Callable[..., object]], None]) -> None:
        self._register = register

    # The narrow forms first: whoever calls the function in a test gets back what it is declared to return.
    # A function of `object` fits these and those for lists, and gets one message.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[[T], R]
    ) -> Callable[[T], R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[[T], R | None]
    ) -> Callable[[T], R | None]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[[T], Result[R]]
    ) -> Callable[[T], Result[R]]: ...
    @overload
    def __call__(self, function: Callable[[Message[T]], R]) -> Callable[[Message[T]], R]: ...
    @overload
    def __call__(self, function: Callable[[Message[T]], R | None]) -> Callable[[Message[T]], R | None]: ...
    @overload
    def __call__(self, function: Callable[[Message[T]], Result[R]]) -> Callable[[Message[T]], Result[R]]: ...
    @overload
    def __call__(
        self, function: Callable[[list[Message[T]]], Sequence[Result[R]]]
    ) -> Callable[[list[Message[T]]], Sequence[Result[R]]]: ...
    @overload
    def __call__(
        self, function: Callable[[list[T]], Sequence[Result[R]]]
    ) -> Callable[[list[T]], Sequence[Result[R]]]: ...
    def __call__(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        self._register(function)
        return function
