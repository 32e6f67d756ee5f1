"""A crash test from beginning to end: services, tables, load, crashes, report; for the command line and for pytest."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eoframework.crashtest.findings import Report
from eoframework.crashtest.load import Sending, of_record
from eoframework.crashtest.user_campaign import Campaign, Options
from eoframework.crashtest.user_run import Consumer, UserApp, ask
from eoframework.crashtest.user_stage import Stage
from eoframework.db.scratch import location
from eoframework.errors import ConfigurationError
from eoframework.kafka.admin import Admin
from eoframework.kafka.scratch import read_range
from eoframework.settings import Settings

_RANGE = re.compile(r"(?P<topic>[A-Za-z0-9._-]+):(?P<start>\d+)-(?P<end>\d+)")


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


def recorded(text: str) -> list[Sending]:
    """The records of a range of a topic, read from the cluster of the settings.

    Raises ConfigurationError, UnknownTopic, Retryable.
    """
    asked = _RANGE.fullmatch(text)
    if asked is None:
        raise ConfigurationError(f"{text!r} is no range.", remedy="Write --range TOPIC:START-END, two offsets.")
    settings = Settings.load()
    topic, start, end = asked["topic"], int(asked["start"]), int(asked["end"])
    partitions = Admin(settings).describe(topic).partitions
    found = [of_record(record) for record in read_range(settings, topic, partitions, start, end)]
    if not found:
        raise ConfigurationError(f"{topic} has no records from offset {start} to {end}.")
    return found


def crash_test(
    question: Question, stage: Stage, *, given: Sequence[Sending] = (), say: Callable[[str], None] = lambda _: None
) -> Report:
    """Prepare the application on this stage, and kill it at each point of its flow.

    given: the load, instead of a generated one. Raises ConfigurationError with what is missing.
    """
    stage.begin(question.variables)
    if question.migrate:
        say(f"making the tables: {question.migrate}")
        stage.migrate(question.migrate)
    answer = ask(
        stage,
        {
            "reference": question.reference,
            "handlers": question.handlers,
            "topics": question.topics,
            "metadata": question.metadata,
            "setup": question.setup,
            "load": "given" if given else "made",
            "sample": str(question.sample.absolute()) if question.sample is not None else "",
            "messages": question.messages,
            "seed": question.seed,
            "database": location(stage.template),
        },
    )
    app = UserApp(
        reference=question.reference,
        name=answer["app"],
        consumers=tuple(Consumer(**one) for one in answer["consumers"]),
        topics=answer["topics"],
        sources=tuple(answer["sources"]),
    )
    if not question.no_tables and not all(one.transform for one in app.consumers) and not stage.has_tables():
        raise ConfigurationError(
            f"{question.reference} has handlers, and there is no table that they could write to.",
            remedy="Say how your tables are made: --metadata MODULE:Base.metadata, --migrate COMMAND or --setup "
            "MODULE:FUNCTION; or that there are none: --no-tables.",
        )
    load = list(given) or [Sending.from_json(one) for one in answer["load"]]
    unknown = sorted({one.topic for one in load} - app.topics.keys())
    if unknown:
        raise ConfigurationError(f"{question.reference} has no topic {', '.join(unknown)}, but the load is for it.")
    generated = not given and question.sample is None and not question.topics
    options = Options(question.seed, question.minutes, question.points, question.allowed, generated)
    return Campaign(stage, app, load, options, say=say).run()
