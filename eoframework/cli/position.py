"""`eo position`: where consumers stand, by an operator's hand."""

from __future__ import annotations

from typing import Annotated

import typer

from eoframework import ops
from eoframework.cli import options, reach
from eoframework.db.position_admin import PositionLine
from eoframework.errors import ConfigurationError
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings

app = typer.Typer(no_args_is_help=True)

Consumer = Annotated[str, typer.Argument(help="<app>.<handler>")]


@app.command()
def show(
    consumer: Annotated[str | None, typer.Argument(help="<app>.<handler>; all without.")] = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Show the next offset of every partition, from where ids are remembered, and who holds it."""
    lines = ops.positions(reach.database(options.start(assignments), wait=not no_wait), consumer)
    text = "\n".join(_line(line) for line in lines) or "no positions"
    options.show([_document(line) for line in lines], text, as_json=as_json)


@app.command("set")
def set_(
    consumer: Consumer,
    partition: Annotated[int, typer.Argument(min=0)],
    offset: Annotated[str, typer.Argument(help="A number, earliest or latest.")],
    topic: Annotated[str | None, typer.Option("--topic", help="If there are several.")] = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Move one partition to an offset and fence the worker that holds it; it goes on from there."""
    settings = options.start(assignments)
    target = _offset(offset)
    database, admin = reach.database(settings, wait=not no_wait), _kafka(settings, wait=not no_wait)
    moved = ops.move_position(database, admin, consumer, partition, target, topic=topic)
    line = moved.line
    text = f"{consumer} {line.topic}[{partition}]: {line.next_offset} -> {moved.offset} (epoch {moved.epoch})"
    if not moved.group_follows:
        text += "\nthe group has members: its offset in Kafka follows when they commit"
    document = {**_document(line), "next_offset": moved.offset, "was": line.next_offset, "epoch": moved.epoch}
    options.show(document | {"group_follows": moved.group_follows}, text, as_json=as_json)


@app.command()
def forget(
    consumer: Consumer,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Delete a stopped consumer's positions, here and in Kafka: its next start is a first start."""
    settings = options.start(assignments)
    database, admin = reach.database(settings, wait=not no_wait), _kafka(settings, wait=not no_wait)
    count = ops.forget_positions(database, admin, consumer)
    options.show(
        {"consumer": consumer, "forgotten": count}, f"{consumer}: {count} positions forgotten", as_json=as_json
    )


def _kafka(settings: Settings, *, wait: bool) -> Admin:
    admin = Admin(settings)
    admin.wait_until_reachable(wait=wait)
    return admin


def _offset(text: str) -> int | ops.Edge:
    if text.isdecimal():
        return int(text)
    if text == "earliest":
        return "earliest"
    if text == "latest":
        return "latest"
    raise ConfigurationError(f"{text!r} is no offset.", remedy="Give a number, earliest or latest.")


def _line(line: PositionLine) -> str:
    holder = f"{line.owner}{'' if line.owner_connected else ' (not connected)'}" if line.owner else "nobody"
    where = f"{line.consumer} {line.topic}[{line.partition}]"
    return f"{where} next {line.next_offset} covered from {line.covered_from} epoch {line.epoch} held by {holder}"


def _document(line: PositionLine) -> dict[str, object]:
    return {
        "consumer": line.consumer,
        "topic": line.topic,
        "topic_id": str(line.topic_id),
        "partition": line.partition,
        "next_offset": line.next_offset,
        "covered_from": line.covered_from,
        "epoch": line.epoch,
        "owner": line.owner,
        "owner_connected": line.owner_connected,
        "claimed_at": line.claimed_at.isoformat() if line.claimed_at else None,
    }
