"""The process in which the application under test lives: it never gets into the process that tests it.

... user_child prepare QUESTION ANSWER       its tables, its topics, its load; then it ends
... user_child eo REPORT MODULE ARGS...      `eo ARGS...`, armed by EO_CRASH_AT
... user_child watched REPORT MODULE ARGS... the same, and what it does is written down
"""

from __future__ import annotations

import atexit
import inspect
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from eoframework import bootstrap, events
from eoframework.app import App
from eoframework.crashtest import armed, load
from eoframework.crashtest.user_watch import Call, Callers, Calls, Globals, home_of
from eoframework.errors import ConfigurationError, EoError
from eoframework.lifecycle import exit_code
from eoframework.provision import dead_letter_topics, wanted_topics
from eoframework.topic import Topic
from eoframework.transforms import Transform

PARTITIONS = 3
"""Of a topic that says nothing of them."""
# After these a handler has been called: nobody else's variables have changed meanwhile.
_AFTER_CALLS = frozenset(
    {"consume.handled", "consume.settled", "consume.failed", "consume.unparked", "transform.handled"}
)
_CLAIMS = frozenset({"consume.claimed", "transform.claimed", "relay.claimed"})
_REFERENCE = re.compile(r"[\w.]+:[\w.]+")


# --- prepare ---


def prepare(question: dict[str, Any]) -> dict[str, Any]:
    """What is asked about the app, with its tables made in the database of the settings."""
    app = bootstrap.load_app(question["reference"])
    _refuse_another_database(app, question["database"])
    chosen = bootstrap.choose(app, question["handlers"])
    if question["metadata"]:
        found = _named(question["metadata"])
        if not hasattr(found, "create_all"):
            raise ConfigurationError(
                f"{question['metadata']} is a {type(found).__name__}, no MetaData.",
                remedy="Write --metadata module:Base.metadata.",
            )
        found.create_all(app.database.engine)
    if question["setup"]:
        _call(question["setup"], app)
    sources = _sources(chosen, question["topics"])
    answer = {
        "app": app.name,
        "consumers": [
            {
                "name": one.name,
                "group": one.group,
                "topic": one.topic.name,
                "transform": isinstance(one, Transform),
            }
            for one in chosen
        ],
        "topics": _topics(app),
        "sources": [topic.name for topic in sources],
        "load": [sending.to_json() for sending in _load(app, sources, question)],
    }
    app.database.engine.dispose()
    return answer


def _refuse_another_database(app: App, expected: list[Any]) -> None:
    url = app.database.engine.url
    found = [url.host, url.port, url.database]
    if found != expected:
        raise ConfigurationError(
            f"{app!r} works on database {url.database!r} at {url.host}:{url.port} whatever EO_DATABASE_URL says, and a "
            "crash test would kill it in the middle of its work there.",
            remedy="Make its engine of EO_DATABASE_URL, or name the variable it is made of: --database-env NAME.",
        )


def _named(reference: str) -> Any:
    module, _, attributes = reference.partition(":")
    if not _REFERENCE.fullmatch(reference):
        raise ConfigurationError(f"{reference!r} names nothing.", remedy="Write module:name.")
    found: Any = import_module(module)
    for name in attributes.split("."):
        if not hasattr(found, name):
            raise ConfigurationError(f"{module} has no {attributes}.", remedy="Write module:name.")
        found = getattr(found, name)
    return found


def _call(reference: str, app: App) -> None:
    function: Callable[..., object] = _named(reference)
    wanted = len(inspect.signature(function).parameters)
    function(*([app.database.engine] if wanted else []))


def _sources(chosen: Sequence[bootstrap.Runnable], names: Sequence[str]) -> list[Topic[Any]]:
    """The topics that are sent to: what no transform of the app fills itself."""
    made = {target.name for one in chosen if isinstance(one, Transform) for target in one.targets}
    read = {one.topic.name: one.topic for one in chosen}
    unknown = sorted(set(names) - set(read))
    if unknown:
        raise ConfigurationError(f"no handler reads {', '.join(unknown)}.", remedy=f"There is: {', '.join(read)}.")
    found = [topic for name, topic in read.items() if (name in names if names else name not in made)]
    return found or list(read.values())


def _topics(app: App) -> dict[str, int]:
    wanted = wanted_topics(app.topics, brokers=1, outbox=None, dead_letters=dead_letter_topics(app))
    return {topic.name: topic.partitions or PARTITIONS for topic in wanted}


def _load(app: App, sources: Sequence[Topic[Any]], question: dict[str, Any]) -> list[load.Sending]:
    if question["load"] == "given":
        return []
    if question["sample"]:
        return load.of_sample(app, sources, Path(question["sample"]))
    return load.generated(sources, messages=question["messages"], seed=question["seed"])


# --- eo ---


class Report:
    """A file of JSON lines: written at once, since the process may be killed."""

    def __init__(self, file: str) -> None:
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, kind: str, **fields: object) -> None:
        os.write(self._descriptor, (json.dumps({"kind": kind, **fields}) + "\n").encode())


class Watcher:
    """A listener that writes down what is passed, and what handlers do besides their transaction."""

    def __init__(self, report: Report, module: str) -> None:
        self._report = report
        self._module = module
        self._point = armed.CrashPoint()
        self._globals: Globals | None = None
        self._named: set[str] = set()
        self._counting = threading.Lock()
        atexit.register(self._end)

    def on_event(self, name: str, fields: dict[str, object]) -> None:
        """To be subscribed."""
        self._point.on_event(name, fields)
        with self._counting:
            if self._globals is None:
                self._begin()
            elif name in _AFTER_CALLS:
                self._look(self._globals)

    def _begin(self) -> None:
        """At the first event the application has been imported, and no handler was called yet."""
        home = home_of(sys.modules[self._module]) if self._module in sys.modules else None
        homes = [home] if home is not None else []
        self._globals = Globals(homes)
        Calls(Callers(homes), self._on_call)

    def _look(self, found: Globals) -> None:
        for change in found.changes():
            if change.name not in self._named:
                self._named.add(change.name)
                self._report.add("global", **asdict(change))

    def _on_call(self, call: Call) -> None:
        self._report.add("call", **asdict(call))

    def _end(self) -> None:
        self._report.add("hits", hits=dict(self._point.seen))


def run(file: str, module: str, arguments: Sequence[str], *, watched: bool) -> None:
    """Be `eo` with these arguments."""
    report = Report(file)

    def tell_claims(name: str, fields: dict[str, object]) -> None:
        if name in _CLAIMS:
            what = fields.get("partition", fields.get("shard"))
            report.add("claimed", who=threading.current_thread().name, what=what)

    # First: who is killed at its claim has told it.
    events.subscribe(tell_claims)
    if watched:
        events.subscribe(Watcher(report, module).on_event)
    armed.main(arguments)


def main(arguments: Sequence[str]) -> None:
    """See the module."""
    kind, first, second, *rest = arguments
    if kind != "prepare":
        run(first, second, rest, watched=kind == "watched")
        return
    try:
        answer = prepare(json.loads(Path(first).read_text()))
    except EoError as error:
        Path(second).write_text(json.dumps({"error": error.what, "remedy": error.remedy}))
        sys.exit(exit_code(error))
    Path(second).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
