"""What a payload type looks like from outside: its members, its fields, and which annotations take it."""

from __future__ import annotations

import dataclasses
import types
from typing import Annotated, Any, Union, get_args, get_origin

from typing_extensions import TypeAliasType, is_typeddict


def unwrap(payload_type: Any) -> Any:
    """The type behind `Annotated[...]` and `type X = ...`."""
    while True:
        if isinstance(payload_type, TypeAliasType) or hasattr(payload_type, "__value__"):
            payload_type = payload_type.__value__
        elif get_origin(payload_type) is Annotated:
            payload_type = get_args(payload_type)[0]
        else:
            return payload_type


def members(payload_type: Any) -> tuple[Any, ...]:
    """The members of a union without None; one member for any other type."""
    bare = unwrap(payload_type)
    if get_origin(bare) in {Union, types.UnionType}:
        return tuple(part for member in get_args(bare) for part in members(member))
    return () if bare is None or bare is types.NoneType else (bare,)


def takes_none(payload_type: Any) -> bool:
    """Whether None is a payload: then a record without a value is a tombstone, not an error."""
    bare = unwrap(payload_type)
    if get_origin(bare) in {Union, types.UnionType}:
        return any(takes_none(member) for member in get_args(bare))
    return bare is None or bare is types.NoneType


def has_field(payload_type: Any, name: str) -> bool:
    """Whether every member has the field `name`; a plain dict may have any."""
    return all(_member_has(member, name) for member in members(payload_type))


def type_name(kind: type, payload_type: Any) -> str | None:
    """The name of what payloads of class `kind` are: the class's own, or the one TypedDict declared; None for dicts,
    bytes and the like."""
    if dataclasses.is_dataclass(kind) or hasattr(kind, "model_fields"):
        return kind.__name__
    known = members(payload_type)
    return str(known[0].__name__) if len(known) == 1 and is_typeddict(known[0]) else None


def record_classes(payload_type: Any) -> tuple[type, ...]:
    """The classes a payload must be an instance of; empty when a member is no model or dataclass."""
    known = members(payload_type)
    return known if all(_is_record_class(member) for member in known) else ()


def required_keys(payload_type: Any) -> frozenset[str]:
    """The keys that a payload must have: those of the one TypedDict declared."""
    known = members(payload_type)
    return frozenset(known[0].__required_keys__) if len(known) == 1 and is_typeddict(known[0]) else frozenset()


def accepts(annotation: Any, payload_type: Any) -> bool:
    """Whether a parameter with this annotation takes every payload of the type."""
    wanted, given = unwrap(annotation), unwrap(payload_type)
    if wanted in (Any, object) or wanted == given:
        return True
    if takes_none(given) and not takes_none(wanted):
        return False
    return all(any(_takes(option, member) for option in members(wanted)) for member in members(given))


def _takes(wanted: Any, given: Any) -> bool:
    if wanted in (Any, object) or wanted == given or wanted == get_origin(given):
        return True
    try:
        return isinstance(wanted, type) and isinstance(given, type) and issubclass(given, wanted)
    except TypeError:  # a TypedDict, or a Protocol, cannot be asked
        return False


def _is_record_class(member: Any) -> bool:
    return isinstance(member, type) and (dataclasses.is_dataclass(member) or hasattr(member, "model_fields"))


def _member_has(member: Any, name: str) -> bool:
    if is_typeddict(member):
        return name in {key for base in (*member.__mro__, member) for key in getattr(base, "__annotations__", {})}
    if dataclasses.is_dataclass(member):
        return name in {field.name for field in dataclasses.fields(member)} or hasattr(member, name)
    fields = getattr(member, "model_fields", None)
    if isinstance(fields, dict):
        return name in fields or hasattr(member, name)
    origin = get_origin(member) or member
    return isinstance(origin, type) and issubclass(origin, dict)
