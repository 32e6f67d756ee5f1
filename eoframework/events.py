"""Named durability boundaries: what has just become durable, told to whoever listens.

Logs, metrics and crash tests are listeners. A flow only says `emit("db.committed", ...)`; it never knows who listens,
so a crash test needs no line of its own in production code. The table of names is in DESIGN.md, "Events".
"""

from __future__ import annotations

from collections.abc import Callable

Listener = Callable[[str, dict[str, object]], None]

_listeners: list[Listener] = []


def subscribe(listener: Listener) -> Callable[[], None]:
    """Call `listener(name, fields)` at every event, on the thread that emits; returns how to unsubscribe."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def emit(name: str, **fields: object) -> None:
    """Tell every listener that the boundary `name` has been passed. Costs one truth test when nobody listens."""
    if _listeners:
        for listener in tuple(_listeners):
            listener(name, fields)
