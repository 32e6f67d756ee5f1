"""`eo external`: calls outside the database that nobody knows the outcome of, and what a person found out."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from eoframework.cli import options, reach
from eoframework.db.external_admin import CallLine, ExternalDesk
from eoframework.ops import BadInput
from eoframework.settings import Settings

app = typer.Typer(no_args_is_help=True)


@app.command()
def ls(
    consumer: Annotated[str | None, typer.Option("--consumer", help="<app>.<handler>")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Those with a result, running or free too.")] = False,
    after: Annotated[int, typer.Option("--after", min=0, help="The last ID of the page before.")] = 0,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10_000)] = 100,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """List calls that may have happened, and whose result is not known."""
    desk = _desk(options.start(assignments), wait=not no_wait)
    found = desk.lines(consumer=consumer, everything=everything, after=after, limit=limit + 1)
    lines = found[:limit]
    text = "\n".join(_line(line) for line in lines) or "no external calls" + ("" if everything else " are unresolved")
    options.show([_document(line) for line in lines], text, as_json=as_json)
    if len(found) > limit:
        # Not on standard output: there is nothing but the list in its JSON.
        typer.echo(f"more: --after {lines[-1].id}", err=True)


@app.command()
def resolve(
    call: Annotated[int, typer.Argument(metavar="ID", min=1, help="From eo external ls.")],
    result: Annotated[str | None, typer.Option("--result", metavar="JSON", help="It happened, with this.")] = None,
    not_done: Annotated[bool, typer.Option("--not-done", help="It surely did not happen.")] = False,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Store what a person found out about one call; the message uses it when it runs again."""
    if (result is None) != not_done:
        raise BadInput("say what you found out.", remedy="Give either --result JSON or --not-done.")
    value = _parse(result) if result is not None else None
    desk = _desk(options.start(assignments), wait=not no_wait)
    line = desk.not_done(call) if result is None else desk.resolve(call, value)
    then = (
        f"eo dead replay MODULE:APP {line.dead_letter}"
        if line.dead_letter is not None
        else "its message runs when it is due"
    )
    outcome = "it did not happen, and is called again" if result is None else "its result is stored"
    document = {"id": line.id, "was": line.state, "dead_letter": line.dead_letter, "done": result is not None}
    options.show(document, f"external call {line.id} of {line.consumer}: {outcome}; next: {then}", as_json=as_json)


def _desk(settings: Settings, *, wait: bool) -> ExternalDesk:
    return ExternalDesk(reach.database(settings, wait=wait))


def _parse(text: str) -> object:
    try:
        # JSON has no NaN, Python's reader does.
        return json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise BadInput(f"--result is no JSON: {error}.", remedy="Quote it: --result '{\"id\": 1}'") from error


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is none of its values")


def _line(line: CallLine) -> str:
    message = f"{line.topic}[{line.partition}]@{line.offset}"
    ended = f", ended with {line.error_class}" if line.error_class else ""
    dead = f", dead letter {line.dead_letter}" if line.dead_letter is not None else ""
    calls = f"{line.calls} call{'s' if line.calls > 1 else ''}{ended}"
    return f"{line.id} {line.consumer} {line.name} {message} {line.state}: {calls}, key {line.key}{dead}"


def _document(line: CallLine) -> dict[str, object]:
    return {
        "id": line.id,
        "consumer": line.consumer,
        "name": line.name,
        "state": line.state,
        "message_id": str(line.message_id),
        "key": line.key,
        "topic": line.topic,
        "partition": line.partition,
        "offset": line.offset,
        "calls": line.calls,
        "owner": line.owner,
        "claimed_at": line.claimed_at.isoformat(),
        "lease_until": line.lease_until.isoformat(),
        "done_at": line.done_at.isoformat() if line.done_at else None,
        "error_class": line.error_class,
        "result": json.loads(line.result) if line.result is not None else None,
        "dead_letter": line.dead_letter,
    }
