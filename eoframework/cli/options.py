"""Options and output that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from eoframework import logs
from eoframework.errors import ConfigurationError
from eoframework.settings import Settings, refuse_crash_points, use_command_line

FINDINGS = 4

Reference = Annotated[str, typer.Argument(metavar="MODULE:APP", help="Where the App is, such as shop.app:app.")]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Exit with 69 when Kafka or PostgreSQL is down.")]
Once = Annotated[bool, typer.Option("--once", help="Do what is there, then exit.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A setting, before all other sources; kafka.KEY=VALUE too."),
]
WorkerIndex = Annotated[int | None, typer.Option("--worker-index", hidden=True)]


def start(assignments: Sequence[str] | None) -> Settings:
    """What every command does first: settings from all sources, then logs that know what must not be shown."""
    refuse_crash_points()
    use_command_line(_parse(assignments or ()))
    settings = Settings.load()
    logs.configure(settings)
    return settings


def show(document: object, text: str, *, as_json: bool) -> None:
    """The command's result on stdout: one JSON document, or text for people."""
    # Redacted before it becomes JSON: in the finished text a pattern could take a closing quote along.
    shown = json.dumps(_redacted(document), ensure_ascii=False, indent=2) if as_json else logs.redact(text)
    if shown:
        typer.echo(shown)


def _redacted(document: object) -> object:
    if isinstance(document, str):
        return logs.redact(document)
    if isinstance(document, dict):
        return {name: _redacted(value) for name, value in document.items()}
    return [_redacted(item) for item in document] if isinstance(document, list | tuple) else document


def _parse(assignments: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigurationError(f"--set {name}: no value.", remedy="Write --set NAME=VALUE.")
        if name.startswith("kafka."):
            values.setdefault("kafka", {})[name.removeprefix("kafka.")] = value
        else:
            values[name.lower().replace("-", "_")] = value
    return values
