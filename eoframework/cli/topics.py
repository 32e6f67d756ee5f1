"""`eo topics`: an app's topics as they should be."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Annotated

import typer

from eoframework import acls, bootstrap, provision
from eoframework.cli import options
from eoframework.db.shards import Shards
from eoframework.kafka.admin import Admin
from eoframework.provision import Difference

app = typer.Typer(no_args_is_help=True)

_SIGNS = {"create": "+", "set": "~", "by hand": "!"}


@app.command()
def plan(
    reference: options.Reference,
    acls_too: Annotated[
        bool, typer.Option("--acls", help="Instead: the rights on Kafka that each process needs; exits with 0.")
    ] = False,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Show what `apply` would do, and change nothing; exit with 4 if there is anything."""
    options.start(assignments)
    if acls_too:
        _show_acls(reference, wait=not no_wait, as_json=as_json)
        return
    _, found = _compare(reference, wait=not no_wait)
    _show(found, as_json=as_json, nothing="all topics are as they should be")
    raise typer.Exit(options.FINDINGS if found else 0)


@app.command()
def apply(
    reference: options.Reference,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Create the missing topics and set what differs; exit with 4 if something is left for a person."""
    options.start(assignments)
    admin, found = _compare(reference, wait=not no_wait)
    provision.apply(found, admin)
    _show(found, as_json=as_json, nothing="nothing to do")
    raise typer.Exit(options.FINDINGS if any(difference.action == "by hand" for difference in found) else 0)


def _show_acls(reference: str, *, wait: bool, as_json: bool) -> None:
    loaded = bootstrap.load_app(reference)
    database = bootstrap.open_database(loaded, stop=threading.Event(), wait=wait, purpose=None)
    assert database is not None, "nobody sets this event"
    outbox_id, _ = Shards(database, loaded.settings).outbox()
    found = acls.acls(loaded, outbox_id=outbox_id)
    commands = [
        f"{acl.command(acls.principal(loaded, acl.process))}{'  # optional' if acl.optional else ''}" for acl in found
    ]
    text = f"{acls.table(found)}\n\n" + "\n".join(commands)
    document = [acl.document() | {"command": command} for acl, command in zip(found, commands, strict=True)]
    options.show({"acls": document}, text, as_json=as_json)


def _compare(reference: str, *, wait: bool) -> tuple[Admin, list[Difference]]:
    ready = bootstrap.prepare(bootstrap.load_app(reference), stop=threading.Event(), wait=wait, purpose=None)
    assert ready is not None, "nobody sets this event"
    brokers = ready.admin.broker_count()
    provision.warn_of_few_brokers(brokers)
    outbox = Shards(ready.database, ready.settings).outbox()
    wanted = provision.wanted_topics(
        ready.app.topics, brokers=brokers, outbox=outbox, dead_letters=provision.dead_letter_topics(ready.app)
    )
    return ready.admin, provision.differences(wanted, ready.admin)


def _show(found: Sequence[Difference], *, as_json: bool, nothing: str) -> None:
    lines = [f"{_SIGNS[difference.action]} {difference.topic}: {difference.what}" for difference in found]
    document = {"differences": [difference.document() for difference in found]}
    options.show(document, "\n".join(lines) or nothing, as_json=as_json)
