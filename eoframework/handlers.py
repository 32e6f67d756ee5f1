"""What `@app.handler` makes of a function: a checked declaration that the executor can call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from eoframework.errors import HandlerMisuse
from eoframework.external import External
from eoframework.message import Message
from eoframework.payload_types import unwrap
from eoframework.retry import AfterDead, FailurePolicy, Ordering
from eoframework.signatures import BATCH_TYPES, Signature, Start, element, shown
from eoframework.topic import Topic
from eoframework.tx import Tx

_POLICY = FailurePolicy()


@dataclass(frozen=True, slots=True)
class Handler:
    """A named subscription of one topic: the function, and how it wants to be called."""

    name: str
    group: str
    """Kafka's consumer group and the consumer's name in the database: `<app>.<name>`."""
    topic: Topic[Any]
    function: Callable[..., object]
    batch: bool
    max_batch: int | None
    start: Start
    where: str
    """`file:line` of the declaration."""
    takes_messages: bool = False
    """Called with a Message, or a list of them, rather than with bare payloads."""
    takes_tx: bool = True
    policy: FailurePolicy = _POLICY
    external: tuple[External, ...] = ()
    """Called for each message before its transaction begins, in this order."""

    @property
    def dead_letter_topic(self) -> str | None:
        """Where its dead letters are published too, if anywhere."""
        return f"{self.group}.dlt" if self.policy.dead_letter_topic else None

    def call(self, message: Message[Any], tx: Tx) -> None:
        """Run the function for one message; whatever it raises comes out as it is."""
        self._run(message if self.takes_messages else message.payload, tx)

    def call_batch(self, messages: Sequence[Message[Any]], tx: Tx) -> None:
        """Run the function for a list of messages; whatever it raises comes out as it is."""
        self._run(list(messages) if self.takes_messages else [message.payload for message in messages], tx)

    def describe_guarantee(self) -> str:
        """The handler's effective guarantee in one line, for the banner."""
        text = "exactly-once processing per message id"
        if self.topic.has_id:
            return f"{text} (from the message, else from the payload)"
        return f"{text}; a message without an id is protected by its position alone: its producer's duplicates count"

    def _run(self, argument: object, tx: Tx) -> None:
        result = self.function(argument, tx) if self.takes_tx else self.function(argument)
        # A forgotten await or a `yield` means that the body has not run, and the message would count as processed.
        if inspect.isawaitable(result) or inspect.isgenerator(result):
            if inspect.iscoroutine(result):
                result.close()
            raise HandlerMisuse(
                f"{self.group} ({self.where}) returned a {type(result).__name__}: its code has not run.",
                remedy=_NO_ASYNC,
            )


def declare(
    function: Callable[..., object],
    topic: Topic[Any],
    *,
    app_name: str,
    name: str | None,
    batch: bool,
    max_batch: int | None = None,
    start: Start = "earliest",
    policy: FailurePolicy = _POLICY,
    external: Sequence[External] = (),
    names: Mapping[str, Any] | None = None,
) -> Handler:
    """Check a function's signature against its topic. `names` resolve annotations of local classes.

    Raises DeclarationError with the function's file and line.
    """
    check = _Check("handler", function, topic, app_name=app_name, names=names or {})
    check.not_awaited()
    handler_name = check.name(name)
    check.options(start=start, max_batch=max_batch, policy=policy)
    check.policy(policy)
    check.external(external, batch=batch, names=names or {})
    takes_messages, takes_tx = check.signature(batch=batch)
    return Handler(
        name=handler_name,
        group=f"{app_name}.{handler_name}",
        topic=topic,
        function=function,
        batch=batch,
        max_batch=max_batch,
        start=start,
        where=check.where,
        takes_messages=takes_messages,
        takes_tx=takes_tx,
        policy=policy,
        external=tuple(external),
    )


class _Check(Signature):
    """What only handlers must be."""

    def not_awaited(self) -> None:
        self.plain(_NO_ASYNC)
        if self.yields:
            self.refuse("it is a generator.", "Its body would never run: publish with tx.publish(...), do not yield.")

    def policy(self, policy: FailurePolicy) -> None:
        for name, value, known in (
            ("ordering", policy.ordering, get_args(Ordering)),
            ("after_dead", policy.after_dead, get_args(AfterDead)),
        ):
            if value not in known:
                self.refuse(f"{name}={value!r}.", f"Use one of {', '.join(map(repr, known))}.")
        if policy.max_parked < 1:
            self.refuse(f"max_parked={policy.max_parked}.", "At least one message must find room, or use retry=None.")
        if policy.after_dead == "hold" and policy.ordering != "key":
            self.refuse(
                f"after_dead='hold' with ordering={policy.ordering!r}.", "Only a key can be held: use ordering='key'."
            )

    def external(self, external: Sequence[External], *, batch: bool, names: Mapping[str, Any]) -> None:
        if external and batch:
            self.refuse("external=... on a batch handler.", "A call belongs to one message: use @app.handler.")
        seen: set[str] = set()
        for one in external:
            if not isinstance(one, External):
                self.refuse(f"external={one!r}.", "Give a list of External(name, function).")
            if one.name in seen:
                self.refuse(f"two external calls are named {one.name!r}.", "Their results would be one: rename one.")
            seen.add(one.name)
            one.check(self.topic.payload_type, names)

    def signature(self, *, batch: bool) -> tuple[bool, bool]:
        """Whether the function wants Messages, and whether it wants the Tx."""
        first, *rest = self.parameters(
            at_most=2, what="it must take the payload or Message, and after it at most `tx: Tx`.", remedy=_SHAPES
        )
        hints = self.hints()
        if hints.get("return", type(None)) not in (None, type(None)):
            self.refuse("it returns something, which nobody would get.", "Annotate `-> None`; publish with tx.publish.")
        if rest and hints.get(rest[0]) is not Tx:
            self.refuse(f"parameter {rest[0]!r} is not annotated as Tx.", "Write `tx: Tx`.")
        if first not in hints:
            self.refuse(f"parameter {first!r} has no annotation.", f"Write `{first}: {self._wanted(batch=batch)}`.")
        return self._wants_message(first, hints[first], batch=batch), bool(rest)

    def _wants_message(self, name: str, annotation: Any, *, batch: bool) -> bool:
        one = element(annotation) if batch else annotation
        remedy = f"Write `{name}: {self._wanted(batch=batch)}`."
        if one is None:
            self.refuse(f"parameter {name!r} of a batch handler is {annotation!r}.", remedy)
        is_message = self.takes_message(one)
        if is_message is None:
            if not batch and get_origin(unwrap(annotation)) in BATCH_TYPES:
                self.refuse(f"parameter {name!r} is {shown(annotation)}.", "For lists use @app.batch_handler(topic).")
            self.refuse(f"parameter {name!r} is {shown(annotation)}, but {self.carries()}.", remedy)
        return is_message

    def _wanted(self, *, batch: bool) -> str:
        payload = shown(self.topic.payload_type)
        return f"list[Message[{payload}]]" if batch else payload


_NO_ASYNC = (
    "Write a plain `def`: a handler runs on the polling thread, inside one database transaction that an event loop "
    "could interleave with others. For outside calls publish a message and let another process act on it."
)
_SHAPES = "Write (payload: T, tx: Tx), (message: Message[T], tx: Tx), or for a batch (batch: list[Message[T]], tx: Tx)."
