"""What a handler does besides its transaction, and a rollback does not take back: seen from inside its process.

`Globals` are the variables of the application's modules, `Calls` what is connected to while a handler runs. A handler
that remembers something, or tells somebody, does it again when its message runs again.
"""

from __future__ import annotations

import ast
import itertools
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any
from uuid import UUID

from eoframework.handlers import Handler
from eoframework.transform.transformer import Transformer
from eoframework.transforms import Transform

_PLAIN = (bool, int, float, complex, str, bytes, Decimal, date, time, timedelta, UUID, Enum, type(None))
_MANY = (list, tuple, set, frozenset, deque)
_DEPTH = 4
_ITEMS = 5_000
_LONG = 200
_LIBRARIES = ("site-packages", "dist-packages", ".venv")

CALLING: frozenset[CodeType] = frozenset(
    function.__code__ for function in (Handler._run, Transform.call_batch, Transformer._handle_one)
)
"""Whoever has one of these among its callers is called for a message."""

_AUDITED = {
    "urllib.Request",
    "socket.getaddrinfo",
    "socket.connect",
    "socket.sendto",
    "smtplib.connect",
    "ftplib.connect",
}


@dataclass(frozen=True, slots=True)
class Change:
    """A variable of the application that was another one after a handler had been called."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name} was {self.before} and is {self.after}"


def line_of(name: str) -> str:
    """`file:line` where a variable (`module.NAME`) is first given a value in its module; empty if nowhere."""
    module, _, variable = name.rpartition(".")
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return ""
    for statement in ast.parse(Path(file).read_bytes()).body:
        targets = getattr(statement, "targets", [getattr(statement, "target", statement)])
        if any(getattr(target, "id", getattr(target, "name", "")) == variable for target in targets):
            return f"{file}:{statement.lineno}"
    return ""


@dataclass(frozen=True, slots=True)
class Call:
    """Something outside that a handler has reached for."""

    what: str
    """A URL, or host:port."""
    where: str
    """`file:line` of the application, empty when it is none of its lines."""

    def __str__(self) -> str:
        return f"{self.what} at {self.where}" if self.where else self.what


def home_of(module: ModuleType) -> Path | None:
    """The directory whose modules are one application with this one: of its outermost package."""
    file = getattr(module, "__file__", None)
    if file is None:
        return None
    depth = module.__name__.count(".") + (0 if hasattr(module, "__path__") else -1)
    directory = Path(file).resolve().parent
    return directory.parents[depth - 1] if depth > 0 else directory


class Globals:
    """The variables of an application's modules."""

    def __init__(self, homes: Iterable[Path]) -> None:
        self._homes = tuple(f"{home}/" for home in homes)
        self._last = self.take()

    def take(self) -> dict[str, str]:
        """Each variable and what it says, as text that differs when its value does."""
        found: dict[str, str] = {}
        modules = {name: module for name, module in sys.modules.items() if self._is_ours(module)}
        for name, module in sorted(modules.items()):
            for variable, value in list(vars(module).items()):
                told = None if variable.startswith("__") else self._variable(value, name, modules)
                if told is not None:
                    found[f"{name}.{variable}"] = told
        return found

    def changes(self) -> list[Change]:
        """What has changed since the last time."""
        before, self._last = self._last, self.take()
        return [
            Change(name, _short(before[name]), _short(after))
            for name, after in self._last.items()
            # What was made when it was first needed, such as an engine, says nothing: it begins with [.
            if name in before and before[name] != after and not after.startswith("[")
        ]

    def _is_ours(self, module: ModuleType) -> bool:
        file = getattr(module, "__file__", None)
        if not file or not str(file).startswith(self._homes):
            return False
        # A virtual environment often lies inside of the application's directory.
        return not any(part in _LIBRARIES for part in Path(file).parts)

    def _variable(self, value: object, name: str, modules: Mapping[str, ModuleType]) -> str | None:
        if isinstance(value, ModuleType):
            return None
        if isinstance(value, type):
            # Told once, where it is defined; and only plain classes: an ORM's mapper changes by being used.
            if type(value) is not type or value.__module__ != name:
                return None
            inside = {key: one for key, one in vars(value).items() if not key.startswith("__") and _is_state(one)}
            return _told(inside, modules) if inside else None
        return _told(value, modules) if _is_state(value) else None


def _is_state(value: object) -> bool:
    return not callable(value) and not hasattr(type(value), "__get__")


def _told(value: object, modules: Collection[str], depth: int = _DEPTH) -> str:
    if isinstance(value, _PLAIN) or type(value) is itertools.count:
        return repr(value)
    if depth == 0:
        return "..."
    if isinstance(value, Mapping):
        items = itertools.islice(list(value.items()), _ITEMS)
        inside = ", ".join(f"{_told(key, modules, 1)}: {_told(one, modules, depth - 1)}" for key, one in items)
        return f"{type(value).__name__} of {len(value)}: {inside}"
    if isinstance(value, _MANY):
        told = [_told(one, modules, depth - 1) for one in itertools.islice(list(value), _ITEMS)]
        # Sets of text have another order in each process, but their order is no change.
        inside = ", ".join(sorted(told) if isinstance(value, set | frozenset) else told)
        return f"{type(value).__name__} of {len(value)}: {inside}"
    if type(value).__module__ in modules:
        return f"{type(value).__name__}({_told(_attributes(value), modules, depth - 1)})"
    return f"[{type(value).__name__}]"


def _attributes(value: object) -> dict[str, Any]:
    slots = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
    return {**{name: getattr(value, name, None) for name in sorted(slots)}, **getattr(value, "__dict__", {})}


def _short(text: str) -> str:
    return text if len(text) <= _LONG else f"{text[:_LONG]} ..."


class Callers:
    """Who is on the stack: whether a handler is being called there, and by which line of the application."""

    def __init__(self, homes: Iterable[Path], *, calling: Collection[CodeType] = CALLING) -> None:
        self._homes = tuple(f"{home}/" for home in homes)
        self._calling = frozenset(calling)

    def own_line(self, frame: FrameType | None) -> str:
        """`file:line` of this very frame, if it is the application's; else empty."""
        file = "" if frame is None else frame.f_code.co_filename
        return f"{file}:{frame.f_lineno}" if frame is not None and self._is_ours(file) else ""

    def _is_ours(self, file: str) -> bool:
        return file.startswith(self._homes) and not _is_library(file)

    def line(self, frame: FrameType | None) -> str | None:
        """`file:line`, the innermost one of the application; None when no handler is being called on this thread."""
        line = ""
        while frame is not None:
            code = frame.f_code
            if not line and self._is_ours(code.co_filename):
                line = f"{code.co_filename}:{frame.f_lineno}"
            if code in self._calling:
                return line
            frame = frame.f_back
        return None


class Calls:
    """What is reached for outside while a handler runs, through Python's own sockets.

    What a thread does that the handler has started is not seen, nor what is reached through a C library.
    """

    def __init__(self, callers: Callers, told: Callable[[Call], None]) -> None:
        """Begins at once; there is no way to take an audit hook off, so `close` makes it deaf (PEP 578)."""
        self._callers = callers
        self._told = told
        self._seen: set[str] = set()
        self._busy = threading.local()
        self._deaf = False
        sys.addaudithook(self._on_event)

    def close(self) -> None:
        """Nothing is told any more."""
        self._deaf = True

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._deaf or event not in _AUDITED or getattr(self._busy, "now", False):
            return
        what = _reached(event, arguments)
        where = None if what is None else self._callers.line(sys._getframe(1))
        # The first event of a call says most: a URL, then a name, then an address.
        if what is None or where is None or where in self._seen:
            return
        self._seen.add(where)
        self._busy.now = True  # telling it may open something itself
        try:
            self._told(Call(what, where))
        finally:
            self._busy.now = False


def _is_library(file: str) -> bool:
    return any(part in _LIBRARIES for part in Path(file).parts)


def _reached(event: str, arguments: tuple[Any, ...]) -> str | None:
    if event == "urllib.Request":
        return str(arguments[0])
    if event == "socket.getaddrinfo":
        return f"{_text(arguments[0])}:{_text(arguments[1])}"
    if event in ("smtplib.connect", "ftplib.connect"):
        return f"{arguments[1]}:{arguments[2]}"
    address = arguments[1]
    # A path is a socket of this machine: syslog, a debugger.
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) and len(address) > 1 else None


def _text(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
