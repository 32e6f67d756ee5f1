"""Which topic of several gets a result that names none: by its class, decided once, when the transform is declared."""

from __future__ import annotations

import types
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from typing_extensions import is_typeddict

from eoframework.payload_types import accepts, members, unwrap
from eoframework.topic import Topic

MANY = (list, tuple)
"""What a function returns several results in; so a payload of such a class cannot stand for itself."""

_MANY_TYPES = (*MANY, Sequence, Collection, Iterable, Iterator, Generator)
_UNIONS = (Union, types.UnionType)


class Routes:
    """The topics of one transform by the class of the payload."""

    def __init__(self, targets: Sequence[Topic[Any]]) -> None:
        self._targets = tuple(targets)
        self._open = tuple(target for target in targets if not carries_lists(target))
        self.by_class: dict[type, Topic[Any]] = {}
        """For the way taken by every message: one look-up."""
        self._shared: set[type] = set()
        for target in self._open:
            for kind in _classes_of(target):
                if kind in self.by_class or kind in self._shared:
                    self._shared.add(kind)
                    self.by_class.pop(kind, None)
                else:
                    self.by_class[kind] = target

    def find(self, payload: object) -> Topic[Any] | None:
        """The topic for a payload: by its class, then by what that derives from, else the only one there is."""
        if payload is None or isinstance(payload, MANY):
            return None
        for kind in type(payload).__mro__:
            if kind in self._shared:
                return None
            if kind in self.by_class:
                return self.by_class[kind]
        # The codec knows better than we what it can write.
        return self._open[0] if len(self._targets) == len(self._open) == 1 else None

    def carriers(self, payload_type: Any) -> tuple[Topic[Any], ...]:
        """The topics that a result declared as this type could go to: none, the one, or more than one."""
        fits = tuple(target for target in self._targets if accepts(target.payload_type, payload_type))
        kinds = _classes(unwrap(payload_type))
        if fits and self._shared.intersection(kinds):
            return tuple(target for target in self._open if self._shared.intersection(kinds, _classes_of(target)))
        exact = dict.fromkeys(self.by_class[kind] for kind in kinds if kind in self.by_class)
        return tuple(exact) if len(fits) > 1 and exact else fits


def carries_lists(target: Topic[Any]) -> bool:
    """Whether its payload may be a list, which would be taken for several results."""
    kinds = (get_origin(member) or member for member in members(target.payload_type))
    return any(kind in _MANY_TYPES or (isinstance(kind, type) and issubclass(kind, MANY)) for kind in kinds)


def results_of(annotation: Any, *, within: bool = False) -> Iterator[Any]:
    """The types of single results in the type of what a function returns; a list inside a list is left as it is."""
    bare = unwrap(annotation)
    origin = get_origin(bare)
    if origin in _UNIONS:
        for member in get_args(bare):
            yield from results_of(member, within=within)
    elif within or not is_many(bare):
        yield bare
    else:
        arguments = get_args(bare)[:1] if origin is Generator else get_args(bare)
        for argument in arguments or (Any,):
            if argument is not Ellipsis:
                yield from results_of(argument, within=True)


def is_many(annotation: Any) -> bool:
    """Whether a value of this type holds several results."""
    return annotation in _MANY_TYPES or get_origin(annotation) in _MANY_TYPES


def _classes_of(target: Topic[Any]) -> set[type]:
    return {kind for member in members(target.payload_type) for kind in _classes(member)}


def _classes(member: Any) -> tuple[type, ...]:
    """The classes that values of a type have; none where that cannot be told."""
    if member is Any:
        return (object,)
    if is_typeddict(member):
        return (dict,)
    if get_origin(member) is Literal:
        return tuple({type(value) for value in get_args(member)})
    kind = get_origin(member) or getattr(member, "__supertype__", member)
    return (kind,) if isinstance(kind, type) else ()
