"""What `@app.transform` makes of a function: a checked declaration of Kafka in, Kafka out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Generic
from uuid import UUID

from typing_extensions import TypeVar

from eoframework.errors import HandlerMisuse
from eoframework.handlers import Start
from eoframework.message import Message
from eoframework.parts import Part
from eoframework.payload_types import members
from eoframework.retry import FailurePolicy
from eoframework.topic import Topic

T = TypeVar("T")

_POLICY = FailurePolicy(ordering="partition")
_MANY = (list, tuple)


@dataclass(frozen=True, slots=True)
class Out(Generic[T]):
    """A message that a transform sends: to which topic, and whatever differs from the topic's declaration.

    key: default the topic's key of the payload, else the key of the message it comes from. id: default the topic's id
    of the payload, else one that is the same however often the transform runs.
    """

    topic: Topic[T]
    payload: T
    key: Part | None = None
    id: UUID | str | None = None
    headers: Mapping[str, str | bytes] | None = None


@dataclass(frozen=True, slots=True)
class Transform:
    """A named subscription of one topic whose results go to other topics, in one Kafka transaction with its offsets."""

    name: str
    group: str
    """Kafka's consumer group, `<app>.<name>`; its offsets are the truth."""
    topic: Topic[Any]
    targets: tuple[Topic[Any], ...]
    function: Callable[..., object]
    batch: bool
    max_batch: int | None
    start: Start
    where: str
    takes_messages: bool = False
    policy: FailurePolicy = _POLICY

    @property
    def dead_letter_topic(self) -> str | None:
        """Where messages go that were given up; None when it stops at them instead."""
        return None if self.policy.retry is None else f"{self.group}.dlt"

    def call(self, message: Message[Any]) -> list[Any]:
        """What the function makes of one message: payloads and Outs; whatever it raises comes out as it is."""
        return self._many(self.function(message if self.takes_messages else message.payload))

    def call_batch(self, messages: Sequence[Message[Any]]) -> list[list[Any]]:
        """What the function makes of each message of a list, in its order."""
        given = list(messages) if self.takes_messages else [message.payload for message in messages]
        returned = self.function(given)
        if type(returned) is not list or len(returned) != len(messages):
            found = f"{len(returned)} results" if isinstance(returned, list) else f"a {type(returned).__name__}"
            raise HandlerMisuse(
                f"{self.group} ({self.where}) returned {found} for {len(messages)} messages.",
                remedy="Return a list with one entry for each message, in order: None, a payload or Out, or a list "
                "of them. So it is known which results belong to which message.",
            )
        return [self._many(one) for one in returned]

    def describe_guarantee(self) -> str:
        """The transform's effective guarantee in one line, for the banner."""
        targets = ", ".join(topic.name for topic in self.targets)
        return f"exactly-once processing to {targets}, by position: its producer's duplicates count"

    def _many(self, returned: Any) -> list[Any]:
        if returned is None:
            return []
        if isinstance(returned, _MANY):
            return [one for one in returned if one is not None]
        if isinstance(returned, Iterator) or inspect.isawaitable(returned):
            return self._drawn(returned)
        return [returned]

    def _drawn(self, returned: Any) -> list[Any]:
        if inspect.isgenerator(returned):
            return [one for one in returned if one is not None]
        if inspect.iscoroutine(returned):
            returned.close()
        raise HandlerMisuse(
            f"{self.group} ({self.where}) returned a {type(returned).__name__}: its code has not run.",
            remedy="Write a plain `def` that returns or yields.",
        )


def declare_transform(
    function: Callable[..., object],
    topic: Topic[Any],
    *,
    to: Topic[Any] | Collection[Topic[Any]],
    app_name: str,
    name: str | None,
    batch: bool,
    max_batch: int | None,
    start: Start,
    policy: FailurePolicy,
) -> Transform:
    """Check a function's signature against its topics. Raises DeclarationError with the function's file and line."""
    assert isinstance(function, FunctionType)
    code = inspect.unwrap(function).__code__
    first = next(iter(inspect.signature(function, eval_str=True).parameters.values()))
    takes_messages = "Message" in str(first.annotation)
    targets = (to,) if isinstance(to, Topic) else tuple(to)
    assert targets
    assert all(members(target.payload_type) for target in targets)
    named = name or function.__name__
    where = f"{code.co_filename}:{code.co_firstlineno}"
    group = f"{app_name}.{named}"
    return Transform(named, group, topic, targets, function, batch, max_batch, start, where, takes_messages, policy)
