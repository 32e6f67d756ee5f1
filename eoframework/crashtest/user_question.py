"""A crash test from beginning to end: services, tables, load, crashes, report; for the command line and for pytest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eoframework.crashtest.findings import Report
from eoframework.crashtest.load import Sending, of_record
from eoframework.crashtest.user_campaign import Campaign, Options, refuse_unknown_points
from eoframework.crashtest.user_run import Consumer, UserApp
from eoframework.crashtest.user_stage import Stage, command_of, surroundings
from eoframework.db.scratch import location
from eoframework.errors import ConfigurationError
from eoframework.kafka.admin import Admin
from eoframework.kafka.scratch import read_range
from eoframework.settings import Settings

_RANGE = re.compile(r"(?P<topic>[A-Za-z0-9._-]+):(?P<start>\d+)-(?P<end>\d+)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Of services that are not started yet: port 1 refuses at once.
_NOWHERE = "postgresql+psycopg://nobody@127.0.0.1:1/nothing"
_NOBODY = "127.0.0.1:1"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be tested, and how."""

    reference: str
    handlers: tuple[str, ...] = ()
    """Only these handlers and transforms."""
    topics: tuple[str, ...] = ()
    """Send to these only; default all that are read and that no transform fills."""
    metadata: str = ""
    """`module:Base.metadata`, whose create_all makes the application's tables."""
    migrate: str = ""
    """A command that makes them."""
    setup: str = ""
    """`module:function`, of an Engine or of nothing, that makes them, or fills them."""
    no_tables: bool = False
    """It has none."""
    sample: Path | None = None
    messages: int = 40
    seed: int = 0
    minutes: float | None = None
    points: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    """Others than EO_DATABASE_URL that hold the database's URL."""

    def document(self, database: str, *, given: bool, look: bool = False) -> dict[str, Any]:
        """What the application's own process is asked. look: it must leave the database alone."""
        return {
            "reference": self.reference,
            "handlers": self.handlers,
            "topics": self.topics,
            "metadata": self.metadata,
            "setup": self.setup,
            "load": "given" if given else "made",
            "sample": str(self.sample.absolute()) if self.sample is not None else "",
            "messages": self.messages,
            "seed": self.seed,
            "database": location(database),
            "look": look,
        }


def recorded(text: str) -> list[Sending]:
    """The records of a range of a topic, read from the cluster of the settings.

    Raises ConfigurationError, UnknownTopic, Unreachable, Retryable.
    """
    asked = _RANGE.fullmatch(text)
    if asked is None:
        raise ConfigurationError(f"{text!r} is no range.", remedy="Write --range TOPIC:START-END, two offsets.")
    settings = Settings.load()
    topic, start, end = asked["topic"], int(asked["start"]), int(asked["end"])
    admin = Admin(settings)
    admin.wait_until_reachable(stop=threading.Event(), wait=False)
    partitions = admin.describe(topic).partitions
    found = [of_record(record) for record in read_range(settings, topic, partitions, start, end)]
    if not found:
        raise ConfigurationError(f"{topic} has no records from offset {start} to {end}.")
    return found


def refuse_what_cannot_be(question: Question, *, path: str = "", given: bool = False) -> None:
    """Look at what is asked before any service is started, since that takes half a minute on a busy machine.

    The application is imported, with a database and a Kafka that do not answer. path: its PYTHONPATH, if it is to have
    one of ours. Raises ConfigurationError with what is wrong.
    """
    refuse_unknown_points(question.points)
    for name in question.variables:
        if not _VARIABLE.fullmatch(name):
            raise ConfigurationError(f"--database-env {name!r} is no variable.", remedy="Write its name alone.")
    if question.migrate:
        command_of(question.migrate)
    names = ("EO_DATABASE_URL", *question.variables)
    with tempfile.TemporaryDirectory(prefix="eo-crashtest-") as directory:
        asked = question.document(_NOWHERE, given=given, look=True)
        found = _ask(asked, Path(directory), surroundings(names, _NOWHERE, _NOBODY, path=path))
    # One that asks its services for something while it is imported has to be looked at when they are there.
    if not found.get("of_services"):
        _answer(found)
        if not (question.metadata or question.migrate or question.setup):
            _refuse_without_tables(question, found)


def _refuse_without_tables(question: Question, answer: Mapping[str, Any]) -> None:
    if not question.no_tables and not all(one["transform"] for one in answer["consumers"]):
        raise ConfigurationError(
            f"{question.reference} has handlers, and there is no table that they could write to.",
            remedy="Say how your tables are made: --metadata MODULE:Base.metadata, --migrate COMMAND or --setup "
            "MODULE:FUNCTION; or that there are none: --no-tables.",
        )


def crash_test(
    question: Question, stage: Stage, *, given: Sequence[Sending] = (), say: Callable[[str], None] = lambda _: None
) -> Report:
    """Prepare the application on this stage, and kill it at each point of its flow.

    given: the load, instead of a generated one. Raises ConfigurationError with what is missing.
    """
    if question.migrate:
        say(f"making the tables: {question.migrate}")
    stage.begin(question.variables, migrate=question.migrate)
    asked = question.document(stage.template, given=bool(given))
    answer = _answer(_ask(asked, stage.directory, stage.variables(stage.template)))
    app = UserApp(
        reference=question.reference,
        name=answer["app"],
        consumers=tuple(Consumer(**one) for one in answer["consumers"]),
        topics=answer["topics"],
    )
    if not stage.has_tables():
        _refuse_without_tables(question, answer)
    load = list(given) or [Sending.from_json(one) for one in answer["load"]]
    unknown = sorted({one.topic for one in load} - app.topics.keys())
    if unknown:
        raise ConfigurationError(f"{question.reference} has no topic {', '.join(unknown)}, but the load is for it.")
    generated = not given and question.sample is None and not question.topics
    filled = frozenset(answer["filled"]) if generated else frozenset[str]()
    options = Options(question.seed, question.minutes, question.points, question.allowed, filled, generated=generated)
    return Campaign(stage, app, load, options, say=say).run()


def _ask(asked: dict[str, Any], directory: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Have the application's own process answer."""
    question, answer = directory / "question.json", directory / "answer.json"
    question.write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-m", "eoframework.crashtest.user_prepare", str(question), str(answer)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if not answer.exists():
        said = (done.stderr or done.stdout)[-3000:].rstrip()
        return {"error": f"{asked['reference']} ended its process with {done.returncode}:\n{said}", "remedy": ""}
    found: dict[str, Any] = json.loads(answer.read_text())
    answer.unlink()
    return found


def _answer(found: dict[str, Any]) -> dict[str, Any]:
    if "error" in found:
        raise ConfigurationError(found["error"], remedy=found["remedy"])
    return found
