"""`eo crashtest`: an app of the user's, killed at each point of its flow on services of its own."""

from __future__ import annotations

import secrets
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from eoframework.cli import options
from eoframework.crashtest.user_question import Question, crash_test, recorded, refuse_what_cannot_be
from eoframework.crashtest.user_stage import Stage
from eoframework.errors import ConfigurationError

_SEEDS = 10_000
_INTERRUPTED = 128 + signal.SIGINT

Several = list[str] | None
Handlers = Annotated[Several, typer.Option("--handler", help="Only this handler or transform; may be repeated.")]
Metadata = Annotated[str, typer.Option(metavar="MODULE:NAME", help="Your tables: such as shop.app:Base.metadata.")]
Migrate = Annotated[str, typer.Option(metavar="COMMAND", help='Your tables: such as "alembic upgrade head".')]
Setup = Annotated[str, typer.Option(metavar="MODULE:FUNCTION", help="Makes or fills your tables; may take an Engine.")]
NoTables = Annotated[bool, typer.Option("--no-tables", help="Your app has none.")]
Messages = Annotated[int, typer.Option(min=1, max=100_000, help="How many are generated.")]
Sample = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Messages, a JSON document a line.")]
Range = Annotated[
    str, typer.Option("--range", metavar="TOPIC:START-END", help="Messages of the settings' Kafka, by offset.")
]
Topics = Annotated[Several, typer.Option("--topic", help="Generate for this topic only; may be repeated.")]
Seed = Annotated[int | None, typer.Option(help="Of the messages and points; default a new one.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Begin no more crashes after so long.")]
Points = Annotated[Several, typer.Option(help="Only this event or flow (consume, relay ...); may be repeated.")]
Allow = Annotated[Several, typer.Option(help="A variable, address or statement that is no effect; may be repeated.")]
DatabaseEnv = Annotated[
    Several, typer.Option(metavar="NAME", help="Another variable your app reads the database's URL from.")
]


def command(
    reference: options.Reference,
    handler: Handlers = None,
    metadata: Metadata = "",
    migrate: Migrate = "",
    setup: Setup = "",
    no_tables: NoTables = False,
    messages: Messages = 40,
    sample: Sample = None,
    span: Range = "",
    topic: Topics = None,
    seed: Seed = None,
    minutes: Minutes = None,
    points: Points = None,
    allow: Allow = None,
    database_env: DatabaseEnv = None,
    as_json: options.Json = False,
    assignments: options.Set = None,
) -> None:
    """Kill an app at each point of its flow, and compare what it comes to with runs without a crash; 4 if it differs.

    Starts a Kafka broker and a PostgreSQL server of its own, and removes them: no database of yours is touched.
    """
    options.start(assignments)
    if sample is not None and span:
        raise ConfigurationError("--sample and --range are two loads.", remedy="Give one of them.")
    question = Question(
        reference=reference,
        handlers=tuple(handler or ()),
        topics=tuple(topic or ()),
        metadata=metadata,
        migrate=migrate,
        setup=setup,
        no_tables=no_tables,
        sample=sample,
        messages=messages,
        seed=secrets.randbelow(_SEEDS) if seed is None else seed,
        minutes=minutes,
        points=tuple(points or ()),
        allowed=tuple(allow or ()),
        variables=tuple(database_env or ()),
    )
    raise typer.Exit(_run(question, span, as_json=as_json))


def _run(question: Question, span: str, *, as_json: bool) -> int:
    # As Ctrl-C does: what was started is ended on the way out.
    signal.signal(signal.SIGTERM, _leave)
    refuse_what_cannot_be(question, given=bool(span))
    given = recorded(span) if span else ()
    _say(f"seed {question.seed}; starting Kafka and PostgreSQL")
    with Stage() as stage:
        report = crash_test(question, stage, given=given, say=_say)
    options.show(report.document(), report.text(), as_json=as_json)
    if report.interrupted:
        return _INTERRUPTED
    return 0 if report.clean else options.FINDINGS


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _say(text: str) -> None:
    typer.echo(text, err=True)
