"""`eo outbox`: what Kafka refused, what is due later and what waits, in an operator's hands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from eoframework import outbox_adoption
from eoframework.cli import filters, options, reach
from eoframework.cli.confirm import confirm
from eoframework.db.pending import MALFORMED
from eoframework.kafka.admin import Admin
from eoframework.legible import legible, parse_bytes
from eoframework.outbox_adoption import Adopted
from eoframework.outbox_desk import (
    ALL,
    Discarded,
    OutboxDesk,
    OutboxFilter,
    OutboxLine,
    OutboxState,
    OutboxStats,
    PutBack,
    Retried,
)

app = typer.Typer(no_args_is_help=True)

Refs = Annotated[
    list[str] | None, typer.Argument(metavar="REF...", help="Dead letters' numbers or message ids, from eo outbox ls.")
]
Error = Annotated[
    str | None, typer.Option("--error", metavar="TEXT", help="Kafka's name of the refusal, or a part of the cause.")
]


@app.command()
def ls(
    state: Annotated[Literal["dead", "delayed", "pending"], typer.Argument(help="Which.")] = "dead",
    topic: filters.TopicName = None,
    key: filters.Key = None,
    error: Error = None,
    since: filters.Since = None,
    until: filters.Until = None,
    limit: filters.Limit = 50,
    after: Annotated[str | None, typer.Option("--after", help="From the page before.")] = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """List messages that Kafka refused for good (dead), that are due later (delayed), or that wait (pending)."""
    desk = _desk(assignments, wait=not no_wait)
    page = desk.lines(state, _filter(topic, key, error, since, until), limit=limit, after=after)
    text = "\n".join(map(_line, page.items)) or f"no {state} outbox messages"
    if page.after is not None:
        text += f"\nmore: --after {page.after}"
    options.show({"items": [_document(line) for line in page.items], "after": page.after}, text, as_json=as_json)


@app.command()
def show(
    ref: Annotated[str, typer.Argument(metavar="REF", help="A dead letter's number, or a message id.")],
    payload: Annotated[bool, typer.Option("--payload", help="Only the payload, as it is.")] = False,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Show one message with all there is of it."""
    line = _desk(assignments, wait=not no_wait).find(ref)
    if payload:
        # As it is, for other programs: not even a secret is taken out of it.
        sys.stdout.buffer.write(line.payload or b"")
        sys.stdout.buffer.flush()
        return
    document = _document(line) | {
        "headers": line.headers if line.headers is None or line.error_class == MALFORMED else json.loads(line.headers),
        "traceparent": line.traceparent,
        "payload": legible(line.payload),
    }
    text = "\n".join(f"{name}: {value}" for name, value in document.items() if value is not None)
    options.show(document, text, as_json=as_json)


@app.command()
def retry(
    refs: Refs = None,
    everything: filters.All = False,
    topic: filters.TopicName = None,
    key: filters.Key = None,
    error: Error = None,
    since: filters.Since = None,
    until: filters.Until = None,
    force: Annotated[bool, typer.Option("--force", help="Even if Kafka would refuse it again.")] = False,
    yes: filters.Yes = False,
    actor: filters.Actor = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Put dead letters back: each is sent before what waits of its key, and keeps its message id."""
    which = _filter(topic, key, error, since, until)
    _one_way(refs, which, everything=everything)
    desk = _desk(assignments, wait=not no_wait, actor=actor)
    if refs:
        retried = desk.retry_each(refs, force=force)
        _report_retried(retried, as_json=as_json)
        if retried.gone:
            raise typer.Exit(options.FINDINGS)
        return
    counted = desk.count("dead", which)
    confirm(f"Put {counted.count} dead letters back into the outbox?", yes=yes or counted.count == 0)
    _report_retried(desk.retry_all(which, force=force, up_to=counted.up_to), as_json=as_json)


@app.command()
def discard(
    refs: Refs = None,
    everything: filters.All = False,
    state: Annotated[Literal["dead", "delayed"], typer.Option("--state", help="With --all: which of them.")] = "dead",
    topic: filters.TopicName = None,
    key: filters.Key = None,
    error: Error = None,
    since: filters.Since = None,
    until: filters.Until = None,
    yes: filters.Yes = False,
    actor: filters.Actor = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Delete dead letters for good, so that their keys go on without them; or delayed messages before they are due."""
    which = _filter(topic, key, error, since, until)
    _one_way(refs, which, everything=everything)
    desk = _desk(assignments, wait=not no_wait, actor=actor)
    if refs:
        done = desk.discard_each(refs)
    else:
        counted = desk.count(state, which)
        confirm(f"Discard {counted.count} {state} messages for good?", yes=yes or counted.count == 0)
        done = Discarded(desk.discard_all(state, which, up_to=counted.up_to))
    lines = [f"{line.ref} {line.message_id} {line.topic}: discarded" for line in done.lines]
    lines += [f"{ref}: {_GONE}" for ref in done.gone]
    document = {"discarded": [_document(line) for line in done.lines], "gone": done.gone}
    options.show(document, "\n".join(lines) or "nothing discarded", as_json=as_json)
    if done.gone:
        raise typer.Exit(options.FINDINGS)


@app.command()
def stats(
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Count what is in the outbox, and say who sends it."""
    found = _desk(assignments, wait=not no_wait).stats()
    oldest = found.oldest_transaction
    document = asdict(found) | {
        "pending": found.pending,
        "shards": [
            asdict(shard) | {"lease_until": shard.lease_until.isoformat() if shard.lease_until else None}
            for shard in found.shards
        ],
        "oldest_transaction": None if oldest is None else {"backend": oldest[0], "age": oldest[1]},
    }
    options.show(document, _stats_text(found), as_json=as_json)


@app.command()
def adopt(
    unknown: Annotated[
        Literal["send", "discard"] | None,
        typer.Option("--unknown", help="What becomes of messages whose topic no longer tells whether they were sent."),
    ] = None,
    actor: filters.Actor = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Go on where Kafka says the outbox is, after a restore or on another cluster; what was sent is not sent again.

    Reads the topics of the pending messages from the time of the oldest one on. No relay may run meanwhile.
    """
    settings = options.start(assignments)
    database, admin = reach.database(settings, wait=not no_wait), Admin(settings)
    admin.wait_until_reachable(wait=not no_wait)
    done = outbox_adoption.adopt(database, settings, admin=admin, unknown=unknown, actor=actor)
    document = {
        "cluster_id": done.cluster_id,
        "batches": {str(shard): list(batches) for shard, batches in done.batches.items()},
        "sent": [str(row.id) for row in done.sent],
        "discarded": [str(row.id) for row in done.discarded],
        "left": done.left,
        "dead_letters_sent": [row.number for row in done.dead_sent],
    }
    options.show(document, _adopted(done), as_json=as_json)


# --- what comes in ---


def _desk(assignments: Sequence[str] | None, *, wait: bool, actor: str | None = None) -> OutboxDesk:
    settings = options.start(assignments)
    return OutboxDesk(reach.database(settings, wait=wait), settings, actor=actor)


def _filter(
    topic: str | None, key: str | None, error: str | None, since: str | None, until: str | None
) -> OutboxFilter:
    return OutboxFilter(
        topic=topic,
        key=parse_bytes(key) if key is not None else None,
        error=error,
        since=filters.parse_time(since, "--since") if since is not None else None,
        until=filters.parse_time(until, "--until") if until is not None else None,
    )


def _one_way(refs: Sequence[str] | None, which: OutboxFilter, *, everything: bool) -> None:
    if bool(refs) == everything or (refs and which != ALL):
        raise typer.BadParameter("give numbers or message ids, or --all with filters")


# --- what goes out ---

_GONE = "was gone when its turn came; eo outbox show says what became of it"


def _report_retried(done: Retried, *, as_json: bool) -> None:
    lines = [f"{one.dead_letter} {one.message_id} {one.topic}: {_standing(one)}" for one in done.moved]
    lines += [f"{number}: {_GONE}" for number in done.gone]
    lines += [f"{left.letter.ref} {left.letter.message_id} left as it is: {left.why}" for left in done.refused]
    document = {
        "retried": [asdict(one) | {"message_id": str(one.message_id)} for one in done.moved],
        "gone": [str(number) for number in done.gone],
        "refused": [{"ref": left.letter.ref, "why": str(left.why)} for left in done.refused],
    }
    options.show(document, "\n".join(lines) or "nothing to retry", as_json=as_json)
    if done.refused:
        raise typer.Exit(options.FINDINGS)


def _standing(done: PutBack) -> str:
    if done.waits_for is not None:
        return f"pending/{done.seq}, waits with its key for dead letter {done.waits_for}"
    return f"pending/{done.seq}, sent first of its key, which goes on" if done.opened else f"pending/{done.seq}"


def _line(line: OutboxLine) -> str:
    key = legible(line.key)
    parts = [line.ref, str(line.message_id), line.topic, f"key {key}" if key is not None else "no key"]
    parts += [f"{line.size} bytes", line.at.isoformat(timespec="seconds")]
    if line.cause is not None:
        parts.append(line.cause)
    if line.held_by is not None:
        parts.append("its key waits for it" if line.state == "dead" else f"waits for dead letter {line.held_by}")
    return "  ".join(parts)


_AT: dict[OutboxState, str] = {"dead": "died_at", "delayed": "deliver_at", "pending": "published_at"}


def _document(line: OutboxLine) -> dict[str, object]:
    return {
        "ref": line.ref,
        "state": line.state,
        "message_id": str(line.message_id),
        "topic": line.topic,
        "key": legible(line.key),
        "shard": line.shard,
        "type": line.type,
        "source": line.source,
        "content_type": line.content_type,
        "size": line.size,
        "created_at": line.created_at.isoformat(),
        _AT[line.state]: line.at.isoformat(),
        "cause": line.cause,
        "error_class": line.error_class,
        "fingerprint": line.fingerprint,
        "held_by": line.held_by,
    }


def _adopted(done: Adopted) -> str:
    if not done.batches:
        return "the outbox and Kafka agree: nothing was changed"
    lines = [f"shard {shard}: batch {before} -> {after}" for shard, (before, after) in sorted(done.batches.items())]
    lines.append(f"{len(done.sent)} pending messages were sent before: taken out of the outbox")
    if done.discarded:
        lines.append(f"{len(done.discarded)} pending messages discarded unread")
    lines.append(f"{done.left} pending messages are sent when a relay runs")
    lines += [f"dead letter {row.number} was sent meanwhile: eo outbox discard {row.number}" for row in done.dead_sent]
    return "\n".join(lines)


def _stats_text(found: OutboxStats) -> str:
    lines = [
        f"pending {found.pending}, of them {found.held_rows} behind {found.held_keys} held keys",
        f"delayed {found.delayed_due} due, {found.delayed_later} later",
        f"dead {found.dead}",
    ]
    for shard in found.shards:
        age = "" if shard.oldest_age is None else f", the first for {shard.oldest_age:.1f} s"
        owner = "nobody" if shard.owner is None else f"{shard.owner}{'' if shard.alive else ' (lease over)'}"
        lines.append(f"shard {shard.shard}: {shard.pending} pending{age}; batch {shard.batch_no}, sent by {owner}")
    if found.oldest_transaction is not None:
        backend, seconds = found.oldest_transaction
        lines.append(f"oldest transaction: backend {backend}, {seconds:.1f} s; dead rows stay until it ends")
    return "\n".join(lines)
