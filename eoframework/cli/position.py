"""`eo position`: where consumers stand, by an operator's hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from eoframework import ops
from eoframework.cli import options, reach
from eoframework.errors import ConfigurationError
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from eoframework.transform.mark import Mark
from eoframework.transform_positions import TransformLine, TransformMoved

app = typer.Typer(no_args_is_help=True)

Consumer = Annotated[str, typer.Argument(help="<app>.<name> of a handler or transform.")]


@app.command()
def show(
    consumer: Annotated[str | None, typer.Argument(help="<app>.<name>; all without.")] = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Show the next offset of every partition; of handlers from where ids are remembered, and who holds it.

    Where a handler stands is in the database (kind "handler"), where a transform stands are its group's offsets in
    Kafka (kind "transform"); those come with what it remembers of the message there: attempts, crashes, takeovers,
    deaths in a row.
    """
    settings = options.start(assignments)
    database = reach.database(settings, wait=not no_wait)
    lines = ops.positions(database, lambda: _kafka(settings, wait=not no_wait), consumer)
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
    """Move one partition to an offset; its consumer goes on from there.

    A handler may be running: the worker that holds the partition is fenced, and messages whose ids are remembered stay
    duplicates. A transform must be stopped, and sends again what it sent for the messages from there on.
    """
    settings = options.start(assignments)
    target = _offset(offset)
    database, admin = reach.database(settings, wait=not no_wait), _kafka(settings, wait=not no_wait)
    moved = ops.move_position(database, admin, consumer, partition, target, topic=topic)
    text, document = _moved(moved)
    options.show(document, text, as_json=as_json)


@app.command()
def forget(
    consumer: Consumer,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="handler|transform", help="If it is both, by a change of the app.")
    ] = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Delete a stopped consumer's positions, here and in Kafka: its next start is a first start."""
    settings = options.start(assignments)
    which = _kind(kind)
    database, admin = reach.database(settings, wait=not no_wait), _kafka(settings, wait=not no_wait)
    count = ops.forget_positions(database, admin, consumer, kind=which)
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


def _kind(text: str | None) -> ops.Kind | None:
    if text is None:
        return None
    if text == "handler":
        return "handler"
    if text == "transform":
        return "transform"
    raise ConfigurationError(f"{text!r} is no kind of consumer.", remedy="There are handler and transform.")


def _line(line: ops.AnyLine) -> str:
    if isinstance(line, TransformLine):
        return _transform_line(line)
    holder = f"{line.owner}{' (not connected)' if line.owner_connected is False else ''}" if line.owner else "nobody"
    where = f"handler {line.consumer} {line.topic}[{line.partition}]"
    return f"{where} next {line.next_offset} covered from {line.covered_from} epoch {line.epoch} held by {holder}"


def _transform_line(line: TransformLine) -> str:
    start = line.start
    where = f"transform {start.consumer} {start.topic}[{start.partition}]"
    following = "none" if line.offset is None else str(line.offset)
    began = f"began at {start.start_offset}" if start.begun else f"not begun, planned at {start.start_offset}"
    counts = [f"{name} {count}" for name, count in asdict(line.mark).items() if count]
    return " ".join([where, f"next {following}", began, *counts, *(["its offset is lost"] if line.lost else [])])


def _moved(moved: ops.Moved | TransformMoved) -> tuple[str, dict[str, object]]:
    document = _document(moved.line) | {"next_offset": moved.offset}
    if isinstance(moved, TransformMoved):
        start, was = moved.line.start, moved.line.offset
        shown = "none" if was is None else was
        text = f"{start.consumer} {start.topic}[{start.partition}]: {shown} -> {moved.offset}"
        return text, document | {"was": was, "begun": True, "mark": asdict(Mark())}
    line = moved.line
    text = f"{line.consumer} {line.topic}[{line.partition}]: {line.next_offset} -> {moved.offset} (epoch {moved.epoch})"
    if not moved.group_follows:
        text += "\nthe group has members: its offset in Kafka follows when they commit"
    now = {"was": line.next_offset, "epoch": moved.epoch, "group_follows": moved.group_follows}
    return text, document | now


def _document(line: ops.AnyLine) -> dict[str, object]:
    if isinstance(line, TransformLine):
        return _transform_document(line)
    return {
        "kind": "handler",
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


def _transform_document(line: TransformLine) -> dict[str, object]:
    start = line.start
    return {
        "kind": "transform",
        "consumer": start.consumer,
        "topic": start.topic,
        "topic_id": str(start.topic_id),
        "partition": start.partition,
        "next_offset": line.offset,
        "start_offset": start.start_offset,
        "begun": start.begun,
        "mark": asdict(line.mark),
    }
