"""Calls that cannot join the database transaction: how a handler declares them, and how their functions end.

Nothing makes the world outside exactly once. What is kept is what is known: that a call may have begun, that it ended
with this result, or that nobody knows; and the same idempotency key for whoever answers it (docs/effects.md).
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from types import FunctionType, MethodType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints
from uuid import UUID, uuid5

from eoframework.errors import DeclarationError, Reject, RetryLater
from eoframework.message import Message
from eoframework.payload_types import accepts, unwrap
from eoframework.where import declaring_frame, location

Unresolved = Literal["ask", "retry", "give_up"]
Results = Mapping[str, object] | None
"""The stored results by name; None: the message has been processed already, and was not called for."""

MAX_RESULT = 65_536
_LONGEST_LEASE = 86_400.0
_NAME = re.compile(r"[a-z0-9_-]{1,100}")


@dataclass(frozen=True, slots=True)
class ExternalCall:
    """What the function of an External is told about one call."""

    key: str
    """The idempotency key: the same however often this is called for this message, never the same for another."""
    attempt: int
    """Which call it is, from 1; earlier ones may or may not have happened."""
    fence: int
    """Grows with whoever may call. A receiver that remembers the highest can refuse a caller that was taken over."""


@dataclass(frozen=True, slots=True)
class External:
    """A call outside the database, made before the handler's transaction begins; its result is stored.

    On a crash: if the result was stored, it is used and the call is not made again. If not, nobody knows whether the
    call happened, and `unresolved` decides once the lease has ended.

    function: takes the Message and an ExternalCall; returns what JSON can hold, at most 64 KiB. It runs with no
    transaction open, may take its time, and must have a timeout of its own, shorter than `lease`. It raises NotDone if
    the call surely did not happen; any other exception leaves it unresolved.
    unresolved: "ask": a dead letter, and a person finds out (`eo external ls`). "retry": called again with the same
    idempotency key; only for a receiver that honours it. "give_up": a dead letter, as if the handler had rejected it.
    lease: seconds in which nobody else calls for the same message. Raises DeclarationError.
    """

    name: str
    function: Callable[[Message[Any], ExternalCall], object]
    _: KW_ONLY
    unresolved: Unresolved = "ask"
    lease: float = 60.0
    where: str = field(default="", init=False, compare=False, repr=False)
    """`file:line` of the declaration."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", location(declaring_frame()))
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            self._refuse("the name is not usable.", "Use 1 to 100 of a-z 0-9 _ -")
        if self.unresolved not in get_args(Unresolved):
            self._refuse(f"unresolved={self.unresolved!r}.", "Use 'ask', 'retry' or 'give_up'.")
        if not 0 < self.lease <= _LONGEST_LEASE:
            self._refuse(f"lease={self.lease!r}.", "Seconds, above 0 and at most a day.")

    def check(self, payload_type: Any, names: Mapping[str, Any]) -> None:
        """Refuse a function that cannot be called for messages of this payload. Raises DeclarationError."""
        function = inspect.unwrap(self.function) if callable(self.function) else None
        if function is None or inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
            self._refuse(f"{self.function!r} cannot be called for its result.", f"{_PLAIN} {_SHAPE}")
        parameters = list(inspect.signature(self.function).parameters.values())
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if len(parameters) != 2 or any(parameter.kind not in positional for parameter in parameters):
            self._refuse("its function must take the message and the call.", _SHAPE)
        self._check_annotations([parameter.name for parameter in parameters], payload_type, names)

    def _check_annotations(self, parameters: Sequence[str], payload_type: Any, names: Mapping[str, Any]) -> None:
        if not isinstance(self.function, FunctionType | MethodType):
            return  # a partial or an object with __call__: nothing that could be read reliably
        try:
            hints = get_type_hints(self.function, localns=dict(names))
        except Exception as error:  # noqa: BLE001 - annotations are any code; NameError is the usual one
            self._refuse(
                f"its annotations cannot be resolved: {error}.", "Import the types where it is defined.", error
            )
        message, call = (unwrap(hints.get(name, Any)) for name in parameters)
        if call not in (ExternalCall, Any):
            self._refuse(f"parameter {parameters[1]!r} is {call!r}.", _SHAPE)
        if message in (Message, Any):
            return
        if get_origin(message) is not Message:
            self._refuse(f"parameter {parameters[0]!r} is {message!r}.", _SHAPE)
        if not accepts(get_args(message)[0], payload_type):
            self._refuse(f"it takes {message!r}, but the handler's topic carries {payload_type!r}.", _SHAPE)

    def _refuse(self, what: str, remedy: str, cause: Exception | None = None) -> NoReturn:
        code = getattr(inspect.unwrap(self.function) if callable(self.function) else None, "__code__", None)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code is not None else self.where
        raise DeclarationError(f"{where}: External({self.name!r}): {what}", remedy=remedy) from cause


class NotDone(RetryLater):
    """Raised by an External's function: the call surely did not happen, and nobody needs to find out.

    Its claim is released and the message fails like any other: again after `after` seconds, or by the handler's Retry.
    Only for what is certain: refused connections, an answer that says so. A timeout is not. An answer such as "card
    declined" is a result: return it.
    """

    def __init__(self, what: str = "the call was not made", *, after: float | None = None) -> None:
        super().__init__(what, after=after)


class InFlight(RetryLater):
    """Another worker may be in the middle of this message's call; nothing was called. No fault of the message."""


class CallUnresolved(Reject):
    """A call may have happened, and its result is not known; it is not made again by itself."""

    because = "nobody knows whether its outside call happened"


def idempotency_key(consumer: str, message_id: UUID, name: str) -> str:
    """The same in every attempt, process and database; another consumer or name is another call."""
    return str(uuid5(message_id, f"{consumer}\0{name}"))


def encode_result(result: object) -> str:
    """The JSON to store. Raises ValueError with the reason why it cannot be."""
    try:
        text = json.dumps(result, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error})") from error
    if len(text) > MAX_RESULT:
        raise ValueError(f"is {len(text)} bytes of JSON, more than {MAX_RESULT}")
    return text


_SHAPE = "Write def f(message: Message[T], call: ExternalCall) -> ..., with T the topic's payload."
_PLAIN = "Give a plain function: it runs on the worker's thread, and must have ended when it returns."
