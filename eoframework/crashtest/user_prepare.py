"""The process that asks the application what it is: its consumers, its topics, its tables, its load; then it ends.

    python -m eoframework.crashtest.user_prepare QUESTION ANSWER

two JSON files. The application is imported here, and never in the process that tests it.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from eoframework import bootstrap
from eoframework.app import App
from eoframework.crashtest import load
from eoframework.crashtest.user_sources import named_by_handlers
from eoframework.errors import ConfigurationError, EoError
from eoframework.provision import dead_letter_topics, wanted_topics
from eoframework.topic import Topic
from eoframework.transforms import Transform

PARTITIONS = 3
"""Of a topic that says nothing of them."""
_REFERENCE = re.compile(r"[\w.]+:[\w.]+")
# What an application says that asks its services for something while it is imported.
_OF_SERVICES = ("sqlalchemy", "psycopg", "confluent_kafka")
_OURS = str(Path(__file__).resolve().parents[1])


def prepare(question: dict[str, Any]) -> dict[str, Any]:
    """What is asked about the app; and, unless it is only looked at, its tables, made in the settings' database."""
    app = bootstrap.load_app(question["reference"])
    _refuse_another_database(app, question["database"])
    chosen = bootstrap.choose(app, question["handlers"])
    metadata, setup = _metadata(question["metadata"]), _setup(question["setup"])
    if metadata is not None and not question["look"]:
        metadata.create_all(app.database.engine)
    if setup is not None and not question["look"]:
        setup(*([app.database.engine] if inspect.signature(setup).parameters else []))
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
        "load": [sending.to_json() for sending in _load(app, sources, question)],
        "filled": sorted({topic.name for topic in sources} & named_by_handlers(chosen)),
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


def _metadata(reference: str) -> Any:
    if not reference:
        return None
    found = _named(reference, option="--metadata module:Base.metadata")
    if isinstance(found, type) or not callable(getattr(found, "create_all", None)):
        raise ConfigurationError(
            f"{reference} is {_kind(found)}, no MetaData.", remedy="Write --metadata module:Base.metadata."
        )
    return found


def _setup(reference: str) -> Callable[..., object] | None:
    if not reference:
        return None
    found: Callable[..., object] = _named(reference, option="--setup module:function")
    if not callable(found):
        raise ConfigurationError(
            f"{reference} is {_kind(found)}, no function.", remedy="Write --setup module:function."
        )
    wanted = [one for one in inspect.signature(found).parameters.values() if one.default is one.empty]
    if len(wanted) > 1:
        raise ConfigurationError(
            f"{reference} takes {len(wanted)} arguments, and is given an Engine.", remedy="Let it take that, or none."
        )
    return found


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"


def _named(reference: str, *, option: str) -> Any:
    module, _, attributes = reference.partition(":")
    if not _REFERENCE.fullmatch(reference):
        raise ConfigurationError(f"{reference!r} names nothing.", remedy=f"Write {option}.")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigurationError(f"there is no module {error.name!r}.", remedy=f"Write {option}.") from error
    for name in attributes.split("."):
        if not hasattr(found, name):
            raise ConfigurationError(f"{module} has no {attributes}.", remedy=f"Write {option}.")
        found = getattr(found, name)
    return found


def _sources(chosen: Sequence[bootstrap.Runnable], names: Sequence[str]) -> list[Topic[Any]]:
    """The topics that are sent to: what no transform of the app fills itself."""
    made = {target.name for one in chosen if isinstance(one, Transform) for target in one.targets}
    read = {one.topic.name: one.topic for one in chosen}
    unknown = sorted(set(names) - set(read))
    if unknown:
        raise ConfigurationError(
            f"--topic {unknown[0]}: no handler reads it.", remedy=f"These are read: {', '.join(sorted(read))}."
        )
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


def main(arguments: Sequence[str]) -> None:
    """See the module."""
    asked, answered = (Path(argument) for argument in arguments)
    question = json.loads(asked.read_text())
    answer: dict[str, Any]
    try:
        answer = prepare(question)
    except EoError as error:
        answer = {"error": error.what, "remedy": error.remedy}
    except Exception as error:  # noqa: BLE001 - whatever the application's code raises is shown to whoever wrote it
        answer = {
            "error": f"{question['reference']} cannot be prepared:\n{_of_the_application(error)}",
            "remedy": "",
            "of_services": isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _OF_SERVICES,
        }
    answered.write_text(json.dumps(answer))


def _of_the_application(error: Exception) -> str:
    """The traceback, from the first line of the application on: how we got there is nothing to it."""
    told = traceback.TracebackException.from_exception(error)
    first = next((n for n, frame in enumerate(told.stack) if not _is_ours(frame.filename)), None)
    if first is not None:
        told.stack = traceback.StackSummary.from_list([f for f in told.stack[first:] if f.filename[:1] != "<"])
    return "".join(told.format())[-3000:].rstrip()


def _is_ours(file: str) -> bool:
    # <frozen importlib._bootstrap> stands between an import and the module.
    return file.startswith((_OURS, "<")) or Path(file).parent.name == "importlib"


if __name__ == "__main__":
    main(sys.argv[1:])
