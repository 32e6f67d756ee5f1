"""Which topics an application's handlers name in their code: the ones that it fills itself, more likely than not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

from eoframework.bootstrap import Runnable
from eoframework.topic import Topic
from eoframework.transforms import Transform

_MOST = 200
"""So many functions are looked through; what calls more of them is guessed from the first ones."""


def named_by_handlers(consumers: Iterable[Runnable]) -> frozenset[str]:
    """The topics that handlers name, but for the one that each of them reads.

    A guess: what is named need not be published to. It saves a run in which messages of ours meet the ones the
    application makes itself, of which half the handlers would fail; a run shows whether it was right.
    """
    return frozenset(
        topic.name
        for one in consumers
        if not isinstance(one, Transform)
        for topic in _topics(one.function)
        if topic.name != one.topic.name
    )


def _topics(function: Callable[..., object]) -> Iterator[Topic[Any]]:
    waiting: list[object] = [function]
    seen: set[object] = set()
    while waiting and len(seen) < _MOST:
        found = waiting.pop()
        if isinstance(found, Topic):
            yield found
        elif isinstance(found, FunctionType) and found not in seen:
            seen.add(found)
            waiting += _mentioned(found)


def _mentioned(function: FunctionType) -> Iterator[object]:
    names = set(_names(function.__code__))
    # A cell may be empty still: a function that calls itself, while it is being defined.
    closed = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    for value in [*(function.__globals__.get(name) for name in names), *closed]:
        if isinstance(value, ModuleType):
            yield from (vars(value).get(name) for name in names)
        else:
            yield value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
