"""What handlers and transforms have in common when they are declared; every complaint names the function's place."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from eoframework.errors import DeclarationError
from eoframework.message import Message
from eoframework.payload_types import accepts, unwrap
from eoframework.retry import Breaker, FailurePolicy, Retry
from eoframework.topic import Topic

Start = Literal["earliest", "latest"]

BATCH_TYPES = (list, Sequence)

# No dot: the group is "<app>.<name>", and two pairs must not make the same group.
_NAME = re.compile(r"[a-z0-9_-]{1,100}")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Signature:
    """Reads one function that is to be called for the messages of a topic."""

    def __init__(
        self, kind: str, function: Callable[..., object], topic: Topic[Any], *, app_name: str, names: Mapping[str, Any]
    ) -> None:
        """kind: what it is to become, for people. names: they resolve annotations of local classes."""
        if not isinstance(function, FunctionType):
            raise DeclarationError(
                f"App({app_name!r}): {function!r} is no {kind}.", remedy="Decorate a function defined with def."
            )
        self._kind = kind
        self._names = names
        self.function = function
        self.topic = topic
        code = inspect.unwrap(function).__code__
        self.where = f"{code.co_filename}:{code.co_firstlineno}"

    def refuse(self, what: str, remedy: str, cause: Exception | None = None) -> NoReturn:
        message = f"{self.where}: {self._kind} {self.function.__name__}: {what}"
        raise DeclarationError(message, remedy=remedy) from cause

    def name(self, given: str | None) -> str:
        """The name given, else the function's."""
        name = given if given is not None else self.function.__name__
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            self.refuse(f"the name {name!r}.", "Use 1 to 100 of a-z 0-9 _ - : give name='...'.")
        return name

    def options(self, *, start: object, max_batch: int | None, policy: FailurePolicy) -> None:
        if start not in get_args(Start):
            self.refuse(f"start={start!r}.", "Use 'earliest' or 'latest'.")
        if max_batch is not None and max_batch < 1:
            self.refuse(f"max_batch={max_batch}.", "A batch has at least one message.")
        if not isinstance(policy.retry, Retry | None):
            self.refuse(f"retry={policy.retry!r}.", "Give Retry(...), or None: then it stops at what fails.")
        if not isinstance(policy.breaker, Breaker | None):
            self.refuse(f"breaker={policy.breaker!r}.", "Give Breaker(...), or None for no limit.")

    def plain(self, remedy: str) -> None:
        if inspect.iscoroutinefunction(self.function) or inspect.isasyncgenfunction(self.function):
            self.refuse("it is async.", remedy)

    @property
    def yields(self) -> bool:
        return inspect.isgeneratorfunction(self.function)

    def parameters(self, *, at_most: int, what: str, remedy: str) -> list[str]:
        """The names of its parameters, each of which can be given by position."""
        parameters = inspect.signature(self.function).parameters.values()
        if not 1 <= len(parameters) <= at_most or any(one.kind not in _POSITIONAL for one in parameters):
            self.refuse(what, remedy)
        return [parameter.name for parameter in parameters]

    def hints(self) -> dict[str, Any]:
        try:
            return get_type_hints(self.function, localns=dict(self._names), include_extras=True)
        except Exception as error:  # noqa: BLE001 - annotations are any code; NameError is the usual one
            self.refuse(
                f"its annotations cannot be resolved: {error}.",
                "Import the type where the function is defined, not only under TYPE_CHECKING.",
                error,
            )

    def takes_message(self, annotation: Any) -> bool | None:
        """Whether a parameter of this type gets the Message (or the payload); None if it takes neither."""
        bare = unwrap(annotation)
        if bare is Message:
            return True
        is_message = get_origin(bare) is Message
        inner = get_args(bare)[0] if is_message else bare
        return is_message if accepts(inner, self.topic.payload_type) else None

    def carries(self) -> str:
        return f"{self.topic!r} carries {shown(self.topic.payload_type)}"


def element(annotation: Any) -> Any:
    """What a list of this type has in it; None if it is no list, or says nothing about it."""
    bare = unwrap(annotation)
    arguments = get_args(bare)
    return arguments[0] if get_origin(bare) in BATCH_TYPES and len(arguments) == 1 else None


def shown(annotation: Any) -> str:
    """A type as people write it."""
    bare = unwrap(annotation)
    return bare.__name__ if isinstance(bare, type) and not get_args(bare) else str(bare)
