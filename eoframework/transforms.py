"""What `@app.transform` makes of a function: a checked declaration of Kafka in, Kafka out."""

from __future__ import annotations

import inspect
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Never, NoReturn, get_args, get_origin
from uuid import UUID

from typing_extensions import TypeVar

from eoframework.errors import FailClosed, HandlerMisuse
from eoframework.parts import Part
from eoframework.payload_types import accepts, unwrap
from eoframework.retry import FailurePolicy
from eoframework.routes import MANY, Routes, carries_lists, is_many, results_of
from eoframework.signatures import Signature, Start, element, shown
from eoframework.topic import Topic
from eoframework.tx import Tx

T = TypeVar("T")

_POLICY = FailurePolicy(ordering="partition")

_NOTHING = (None, type(None))
_UNCHECKED = (Any, object, Never, NoReturn)


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
    """`file:line` of the declaration."""
    takes_messages: bool = False
    """Called with a Message, or a list of them, rather than with bare payloads."""
    policy: FailurePolicy = _POLICY
    _routes: Routes = field(init=False, repr=False, compare=False)
    _by_class: Mapping[type, Topic[Any]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        routes = Routes(self.targets)
        object.__setattr__(self, "_routes", routes)
        object.__setattr__(self, "_by_class", routes.by_class)

    @property
    def dead_letter_topic(self) -> str | None:
        """Where messages go that were given up; None when it stops at them instead."""
        return None if self.policy.retry is None else f"{self.group}.dlt"

    @property
    def by_class(self) -> Mapping[type, Topic[Any]]:
        """Where payloads of these classes go; such a payload is one result, whatever else it may be."""
        return self._by_class

    def call_batch(self, given: list[Any]) -> list[Any]:
        """What the function returns for each message of a list, in its order.

        Raises FailClosed when it is not known which belong to which: no message is to blame, and none is given up.
        """
        # The list it gets is its own: one that takes out what it has done must not make us forget that it was there.
        returned = self.function(given.copy())
        if type(returned) is not list or len(returned) != len(given):
            found = f"{len(returned)} results" if isinstance(returned, list) else f"a {type(returned).__name__}"
            raise FailClosed(
                f"{self.group} ({self.where}) returned {found} for {len(given)} messages.",
                remedy=_LIST_FOR_LIST,
            )
        return returned

    def results(self, returned: Any) -> list[Any]:
        """The payloads and Outs in what the function returned for one message."""
        kind = type(returned)
        if kind in self._by_class or kind is Out:
            return [returned]
        if returned is None:
            return []
        if isinstance(returned, MANY):
            return [one for one in returned if one is not None]
        if isinstance(returned, Iterator):
            return [one for one in self._drawn(returned) if one is not None]
        if isinstance(returned, Awaitable | AsyncIterator):
            self._not_run(returned)
        return [returned]

    def target_of(self, payload: Any) -> Topic[Any]:
        """The topic for a result that names none. Raises HandlerMisuse where that would be a guess."""
        found = self._by_class.get(type(payload))
        return found if found is not None else self._look_further(payload)

    def describe_guarantee(self) -> str:
        """The transform's effective guarantee in one line, for the banner."""
        targets = ", ".join(topic.name for topic in self.targets)
        return f"exactly-once processing to {targets}, by position: its producer's duplicates count"

    def _look_further(self, payload: Any) -> Topic[Any]:
        found = self._routes.find(payload)
        if found is not None:
            return found
        if payload is None:
            what, remedy = "None is no payload", "For a tombstone say Out(topic, None, key=...)."
        elif isinstance(payload, MANY):
            what, remedy = f"a {type(payload).__name__} among its results is read as several", _SAY_OUT
        else:
            kind = type(payload).__name__
            what, remedy = f"it is not known where a {kind} goes: {_carried(self.targets)}", _SAY_OUT
        raise HandlerMisuse(f"{self.group} ({self.where}): {what}.", remedy=remedy)

    def _drawn(self, returned: Any) -> Iterator[Any]:
        ended = yield from returned
        if ended is not None:
            raise HandlerMisuse(
                f"{self.group} ({self.where}) yields, and returned a {type(ended).__name__} that nobody would get.",
                remedy="Yield it too.",
            )

    def _not_run(self, returned: object) -> NoReturn:
        if inspect.iscoroutine(returned):
            returned.close()
        raise HandlerMisuse(
            f"{self.group} ({self.where}) returned a {type(returned).__name__}: its code has not run.",
            remedy=_NO_ASYNC,
        )


def declare_transform(
    function: Callable[..., object],
    topic: Topic[Any],
    *,
    to: Topic[Any] | Collection[Topic[Any]],
    app_name: str,
    name: str | None,
    max_batch: int | None = None,
    start: Start = "earliest",
    policy: FailurePolicy = _POLICY,
    names: Mapping[str, Any] | None = None,
) -> Transform:
    """Check a function's signature against its topics. `names` resolve annotations of local classes.

    Raises DeclarationError with the function's file and line.
    """
    check = _Check("transform", function, topic, app_name=app_name, names=names or {})
    check.plain(_NO_ASYNC)
    own_name = check.name(name)
    check.options(start=start, max_batch=max_batch, policy=policy)
    targets = check.targets(to, group=f"{app_name}.{own_name}", policy=policy)
    takes_messages, batch = check.parameter()
    if max_batch is not None and not batch:
        check.refuse(f"max_batch={max_batch}, but it takes one message at a time.", "Take a list, or leave it out.")
    check.returned(targets, batch=batch)
    return Transform(
        name=own_name,
        group=f"{app_name}.{own_name}",
        topic=topic,
        targets=targets,
        function=function,
        batch=batch,
        max_batch=max_batch,
        start=start,
        where=check.where,
        takes_messages=takes_messages,
        policy=policy,
    )


class _Check(Signature):
    """What a transform takes, and what it may return."""

    def targets(self, to: object, *, group: str, policy: FailurePolicy) -> tuple[Topic[Any], ...]:
        given = (to,) if isinstance(to, Topic) else to
        if not isinstance(given, Collection) or not all(isinstance(one, Topic) for one in given):
            self.refuse(f"to={to!r}.", "Give a Topic, or several: to={reserved, refused}.")
        # A set has another order in each process, and the banner should not.
        targets = tuple(sorted(given, key=lambda one: one.name) if isinstance(given, set | frozenset) else given)
        if not targets:
            self.refuse("it sends to no topic.", "Name one: to=topic. What only acts on a database is an @app.handler.")
        seen: set[str] = set()
        for target in targets:
            if target.name in seen:
                self.refuse(f"to= names {target!r} twice.", "Name it once.")
            seen.add(target.name)
        if self.topic.name in seen:
            self.refuse(f"it reads and sends to {self.topic!r}: it would never end.", "Send to another topic.")
        letters = f"{group}.dlt"
        if policy.retry is not None and letters in seen | {self.topic.name}:
            self.refuse(f"{letters!r} is where its own dead letters go.", "Give it another name='...'.")
        return targets

    def parameter(self) -> tuple[bool, bool]:
        """Whether the function wants Messages, and whether it wants lists of what it wants."""
        hints = self.hints()
        if any(hint is Tx for hint in hints.values()):
            self.refuse("it takes a Tx, but a transform has no database transaction.", _USE_A_HANDLER)
        shapes = self._shapes("batch")
        (name,) = self.parameters(at_most=1, what="it must take one thing, the payload or Message.", remedy=shapes)
        if name not in hints:
            self.refuse(f"parameter {name!r} has no annotation.", self._shapes(name))
        one = self.takes_message(hints[name])
        inside = element(hints[name])
        many = None if inside is None else self.takes_message(inside)
        if one is not None and many is not None:
            self.refuse(
                f"parameter {name!r} is {shown(hints[name])}, and {self.carries()}: that is one message, or a batch.",
                f"Say which: `{name}: Message[...]` or `{name}: list[Message[...]]`.",
            )
        if one is None and many is None:
            self.refuse(f"parameter {name!r} is {shown(hints[name])}, but {self.carries()}.", self._shapes(name))
        return bool(one or many), one is None

    def returned(self, targets: Sequence[Topic[Any]], *, batch: bool) -> None:
        """Refuse a function that says it returns what no topic of these takes, or what more than one does."""
        if batch and self.yields:
            self.refuse("it is a generator that takes a batch.", _LIST_FOR_LIST)
        annotation = unwrap(self.hints().get("return", Any))
        if batch and annotation not in (*_UNCHECKED, list):
            if get_origin(annotation) is not list:
                self.refuse(f"it takes a batch and returns {shown(annotation)}.", _LIST_FOR_LIST)
            annotation = get_args(annotation)[0]
        found = list(results_of(annotation))
        if all(one in _NOTHING for one in found):
            self.refuse("it returns nothing, so nothing would be sent.", "Annotate what it returns, and return it.")
        routes = Routes(targets)
        for one in found:
            if get_origin(one) is Out:
                self._out(get_args(one)[0], targets)
            elif one not in (*_NOTHING, *_UNCHECKED, Out) and not isinstance(one, typing.TypeVar):
                self._payload(one, targets, routes)

    def _out(self, payload_type: Any, targets: Sequence[Topic[Any]]) -> None:
        if payload_type in _UNCHECKED or isinstance(payload_type, typing.TypeVar):
            return
        if not any(accepts(target.payload_type, payload_type) for target in targets):
            self.refuse(f"it returns Out[{shown(payload_type)}], but {_carried(targets)}.", _FIT)

    def _payload(self, payload_type: Any, targets: Sequence[Topic[Any]], routes: Routes) -> None:
        what = f"it returns {shown(payload_type)}"
        if is_many(payload_type):
            self.refuse(f"{what} inside a list.", _SAY_OUT)
        carriers = routes.carriers(payload_type)
        listed = [target for target in carriers or targets if carries_lists(target)]
        if listed:
            self.refuse(f"{what}, but {_carried(listed)}, and a list is read as several results.", _SAY_OUT)
        if not carriers:
            self.refuse(f"{what}, but {_carried(targets)}.", _FIT)
        if len(carriers) > 1:
            self.refuse(f"{what}, which {' and '.join(map(repr, carriers))} carry.", _SAY_OUT)

    def _shapes(self, name: str) -> str:
        payload = shown(self.topic.payload_type)
        return (
            f"Write `{name}: {payload}` or `{name}: Message[{payload}]`; for a batch `{name}: list[{payload}]` or "
            f"`{name}: list[Message[{payload}]]`."
        )


def _carried(targets: Sequence[Topic[Any]]) -> str:
    return ", ".join(f"{target!r} carries {shown(target.payload_type)}" for target in targets)


_NO_ASYNC = (
    "Write a plain `def` that returns or yields: a transform runs on the polling thread, in the order of its messages. "
    "What has to call others belongs in an @app.handler (see External)."
)
_USE_A_HANDLER = (
    "For effects in the database use @app.handler: what it sends with tx.publish goes through the outbox, in the same "
    "transaction."
)
_LIST_FOR_LIST = (
    "Return a list with one entry for each message, in order: None, a payload or Out, or a list of them. So it is "
    "known which results belong to which message."
)
_SAY_OUT = "Say where it goes: Out(topic, payload)."
_FIT = "Return what a topic of to= carries, or name the topic there."
