"""`eo dead`: messages that handlers were given up on, and those that wait."""

from __future__ import annotations

import shlex
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any

import typer

from eoframework import bootstrap, dead, lifecycle
from eoframework.app import App
from eoframework.cli import dead_shown, filters, options, reach
from eoframework.cli.confirm import confirm
from eoframework.db.session import Database
from eoframework.errors import NotFound
from eoframework.legible import legible

app = typer.Typer(no_args_is_help=True)

LetterId = Annotated[int, typer.Argument(metavar="ID", min=1, help="The number that ls shows.")]
Ids = Annotated[list[int] | None, typer.Argument(metavar="[ID]...", help="The numbers that ls shows.")]


@app.command()
def ls(
    handler: filters.Handler = None,
    topic: filters.TopicName = None,
    key: filters.Key = None,
    error: filters.Error = None,
    fingerprint: filters.Fingerprint = None,
    since: filters.Since = None,
    until: filters.Until = None,
    parked: Annotated[bool, typer.Option("--parked", help="Keys that wait, instead of dead letters.")] = False,
    by: Annotated[str | None, typer.Option("--by", help="fingerprint: how many died of what.")] = None,
    group: Annotated[bool, typer.Option("--group", help="The same as --by fingerprint.")] = False,
    limit: filters.Limit = 50,
    after: Annotated[str | None, typer.Option("--after", help="The next page, as the last one said.")] = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """List dead letters, the oldest first; or what they died of; or the keys that wait.

    Those of handlers: a transform's are in Kafka, in the topic <app>.<name>.dlt.
    """
    if by not in (None, "fingerprint") or (parked and (by or group)):
        raise typer.BadParameter("there is --by fingerprint, for dead letters", param_hint="--by")
    settings = options.start(assignments)
    chosen = filters.choose(handler, topic, key, error, fingerprint, since, until)
    database = reach.database(settings, wait=not no_wait)
    if parked:
        found = dead.lanes(database, chosen.which, limit=limit, after=after)
        _show_page("lanes", found, dead_shown.lane_document, dead_shown.lane_line, as_json=as_json)
    elif by or group:
        groups = dead.groups(database, chosen.which, limit=limit, after=_number(after))
        _show_page("groups", groups, dead_shown.group_document, dead_shown.group_line, as_json=as_json)
    else:
        letters = dead.letters(database, chosen.which, limit=limit, after=_number(after))
        _show_page("dead_letters", letters, dead_shown.letter_document, dead_shown.letter_line, as_json=as_json)


@app.command()
def show(
    letter_id: Annotated[int | None, typer.Argument(metavar="[ID]", min=1, help="The number that ls shows.")] = None,
    key: filters.Key = None,
    handler: filters.Handler = None,
    payload: Annotated[bool, typer.Option("--payload", help="Only the payload's bytes, to standard output.")] = False,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Show one dead letter whole; or, with --key, everything that died or waits with that key."""
    if (letter_id is None) == (key is None) or (payload and (as_json or letter_id is None)):
        raise typer.BadParameter("give an ID (and --payload or --json), or --key")
    settings = options.start(assignments)
    chosen = filters.choose(handler, None, key, None, None, None, None)
    database = reach.database(settings, wait=not no_wait)
    if letter_id is None:
        _show_key(database, chosen.which, as_json=as_json)
        return
    letter = dead.find(database, letter_id)
    if payload:
        # As it came, for other programs: not even a secret is taken out of it.
        sys.stdout.buffer.write(letter.record.value or b"")
        sys.stdout.buffer.flush()
        return
    options.show(dead_shown.whole_letter_document(letter), dead_shown.letter_text(letter), as_json=as_json)


@app.command("try")
def try_(
    reference: options.Reference,
    letter_id: LetterId,
    rows: Annotated[int, typer.Option("--rows", min=1, max=10_000, help="Show at most so many rows a table.")] = 50,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Run the handler on a dead letter and roll back: which rows it would change, what it would publish, why it fails.

    Exits with 4 when it fails. Numbers drawn from sequences, and what the handler does outside its transaction, are
    not taken back.
    """
    loaded = _app(reference, assignments, wait=not no_wait)
    letter = dead.find(loaded.database, letter_id)
    trial = dead.try_letter(loaded, letter_id, rows=rows)
    document, text = dead_shown.trial_document(letter, trial), dead_shown.trial_text(letter, trial)
    options.show(document, text, as_json=as_json)
    if trial.error is not None:
        raise typer.Exit(options.FINDINGS)


@app.command()
def replay(
    reference: options.Reference,
    ids: Ids = None,
    everything: filters.All = False,
    handler: filters.Handler = None,
    topic: filters.TopicName = None,
    key: filters.Key = None,
    error: filters.Error = None,
    fingerprint: filters.Fingerprint = None,
    since: filters.Since = None,
    until: filters.Until = None,
    rate: Annotated[str | None, typer.Option("--rate", metavar="N/s", help="At most so many a second.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and say what would be done.")] = False,
    yes: filters.Yes = False,
    actor: filters.Actor = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Send dead letters through their handler again, in the order of their keys and with fresh attempts; exactly once.

    They go back into their lanes, and the running consumer (or the next one that starts) takes them from there. It may
    be killed or issued twice at any moment. With --all, what cannot be replayed is left and told: exit code 4.
    """
    chosen = filters.choose(handler, topic, key, error, fingerprint, since, until)
    _one_way(ids, chosen, everything=everything)
    speed = filters.parse_rate(rate) if rate is not None else None
    loaded = _app(reference, assignments, wait=not no_wait)
    stop = threading.Event()
    how: dict[str, Any] = {"actor": actor, "rate": speed, "dry_run": dry_run, "stop": stop}
    if everything and not dry_run:
        counted = dead.counted(loaded.database, dead.of_app(chosen.which, loaded))
        confirm(f"Replay {counted.count} dead letters of {loaded.name}?", yes=yes)
        how["up_to"] = counted.up_to
    with lifecycle.signals(stop):
        done = dead.replay_all(loaded, chosen.which, **how) if everything else dead.replay(loaded, ids or (), **how)
    document, text = (
        dead_shown.replayed_document(done, dry_run=dry_run),
        dead_shown.replayed_text(done, dry_run=dry_run),
    )
    options.show(document, text, as_json=as_json)
    if done.refused:
        raise typer.Exit(options.FINDINGS)


@app.command()
def discard(
    ids: Ids = None,
    everything: filters.All = False,
    handler: filters.Handler = None,
    topic: filters.TopicName = None,
    key: filters.Key = None,
    error: filters.Error = None,
    fingerprint: filters.Fingerprint = None,
    since: filters.Since = None,
    until: filters.Until = None,
    parked: Annotated[bool, typer.Option("--parked", help="What waits in keys, instead of dead letters.")] = False,
    forget_id: Annotated[
        bool, typer.Option("--forget-id", help="The message, published anew with the id it had, is to be run.")
    ] = False,
    yes: filters.Yes = False,
    actor: filters.Actor = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Delete dead letters for good; their messages stay processed, and a key that was held for one goes on.

    With --parked: the messages that wait, by --handler, --key and the other filters; they count as processed, too.
    """
    chosen = filters.choose(handler, topic, key, error, fingerprint, since, until)
    if forget_id and (parked or everything):
        raise typer.BadParameter("give IDs, whose payloads you have saved", param_hint="--forget-id")
    if parked:
        _discard_parked(ids, chosen, everything, assignments, yes=yes, actor=actor, as_json=as_json, wait=not no_wait)
        return
    _one_way(ids, chosen, everything=everything)
    database = reach.database(options.start(assignments), wait=not no_wait)
    if everything:
        counted = dead.counted(database, chosen.which)
        confirm(f"Delete {counted.count} dead letters for good?", yes=yes)
        done = dead.discard_all(database, chosen.which, actor=actor, up_to=counted.up_to)
    else:
        done = dead.discard(database, ids or (), actor=actor, forget_id=forget_id)
    options.show({"discarded": done}, f"{len(done)} dead letters deleted", as_json=as_json)


def _discard_parked(
    ids: list[int] | None,
    chosen: filters.Chosen,
    everything: bool,
    assignments: list[str] | None,
    *,
    yes: bool,
    actor: str | None,
    as_json: bool,
    wait: bool,
) -> None:
    if ids or not (everything or chosen.narrowed):
        raise typer.BadParameter(
            "with --parked give filters, such as --handler and --key, or --all", param_hint="--parked"
        )
    database = reach.database(options.start(assignments), wait=wait)
    counted = dead.counted_parked(database, chosen.which)
    confirm(f"Delete {counted.count} parked messages for good?", yes=yes)
    done = dead.discard_parked(database, chosen.which, actor=actor, up_to=counted.up_to)
    options.show({"discarded_parked": done}, f"{done} parked messages deleted", as_json=as_json)


def _show_key(database: Database, which: dead.DeadFilter, *, as_json: bool) -> None:
    """What waits and what died with one key; a handler's lanes of one key are as many as its topics and partitions."""
    lanes, letters = dead.lanes(database, which), dead.letters(database, which)
    waiting = [(lane, dead.waiting(database, lane)) for lane in lanes.items]
    if not lanes.items and not letters.items:
        raise NotFound("nothing waits and nothing died with this key.", remedy="See: eo dead ls --parked")
    document = {
        "lanes": [
            dead_shown.lane_document(lane)
            | {
                "waiting": [dead_shown.message_document(message) for message in page.items],
                "more": page.after is not None,
            }
            for lane, page in waiting
        ],
        "dead_letters": [dead_shown.letter_document(letter) for letter in letters.items],
        "after": {"lanes": lanes.after, "dead_letters": letters.after},
    }
    lines = []
    for lane, page in waiting:
        lines += [dead_shown.lane_line(lane), *map(dead_shown.message_line, page.items)]
        lines += ["  ... and more"] * (page.after is not None)
    lines += _more_of_key("eo dead ls --parked", which, lanes.after)
    lines += [*map(dead_shown.letter_line, letters.items), *_more_of_key("eo dead ls", which, letters.after)]
    options.show(document, "\n".join(lines), as_json=as_json)


def _more_of_key(command: str, which: dead.DeadFilter, after: str | None) -> list[str]:
    if after is None:
        return []
    given = [f"--key={legible(which.key)}", *([f"--handler={which.handler}"] if which.handler else [])]
    return [f"more: {command} {shlex.join(given)} --after {after}"]


def _show_page(
    name: str,
    page: dead.Page[Any],
    document: Callable[[Any], dead_shown.Document],
    line: Callable[[Any], str],
    *,
    as_json: bool,
) -> None:
    lines = [line(item) for item in page.items] or ["none"]
    if page.after is not None:
        lines.append(f"more: the same with --after {page.after}")
    options.show(
        {name: [document(item) for item in page.items], "after": page.after}, "\n".join(lines), as_json=as_json
    )


def _one_way(ids: list[int] | None, chosen: filters.Chosen, *, everything: bool) -> None:
    if bool(ids) == everything or (ids and chosen.narrowed):
        raise typer.BadParameter("give IDs, or --all with filters")


def _number(after: str | None) -> int:
    if after is None:
        return 0
    if not after.isdecimal():
        raise typer.BadParameter(f"{after!r} is no number of a dead letter", param_hint="--after")
    return int(after)


def _app(reference: str, assignments: list[str] | None, *, wait: bool) -> App:
    options.start(assignments)
    loaded = bootstrap.load_app(reference)
    bootstrap.open_database(loaded, stop=threading.Event(), wait=wait)
    return loaded
