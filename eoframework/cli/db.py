"""`eo db`: eoframework's tables."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from eoframework.cli import filters, options, reach
from eoframework.cli.confirm import confirm
from eoframework.db import adopting, grants, migrating, readiness
from eoframework.db.adopting import Meaning
from eoframework.db.audit import whoever
from eoframework.db.grants import Purpose, Roles
from eoframework.schema import Schema

app = typer.Typer(no_args_is_help=True)

Revision = Annotated[str, typer.Argument(help="A version, or head for the newest.")]


@app.command()
def upgrade(
    revision: Revision = "head",
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Bring the tables to a version, in one transaction."""
    _refuse_an_app(revision)
    database = reach.server(options.start(assignments), wait=not no_wait)
    before = migrating.current(database)
    after = migrating.upgrade(database, revision)
    text = f"at version {after} already" if before == after else f"{before or 'no tables'} -> {after}"
    options.show({"from": before, "to": after, "schema": database.schema.name}, text, as_json=as_json)


@app.command()
def downgrade(
    revision: Annotated[str, typer.Argument(help="A version; base: all tables and what is in them are gone.")],
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Take the tables back to a version, in one transaction."""
    _refuse_an_app(revision)
    database = reach.server(options.start(assignments), wait=not no_wait)
    before = migrating.current(database)
    after = migrating.downgrade(database, revision)
    document = {"from": before, "to": after, "schema": database.schema.name}
    options.show(document, f"{before or 'no tables'} -> {after or 'no tables'}", as_json=as_json)


def _refuse_an_app(revision: str, *, ranges: bool = False) -> None:
    """Most commands want MODULE:APP here; alembic would take it for a range of versions."""
    first, colon, last = revision.partition(":")
    if colon and not (ranges and {first, last} & {"base", "head", *migrating.versions()}):
        raise typer.BadParameter(
            f"{revision!r} is no version: our tables are the same for every app, so no app is named here. Leave it out "
            f"for the newest, or give one of {', '.join(migrating.versions())}",
            param_hint="REVISION",
        )


@app.command()
def current(as_json: options.Json = False, no_wait: options.NoWait = False, assignments: options.Set = None) -> None:
    """Show the version of the tables."""
    database = reach.server(options.start(assignments), wait=not no_wait)
    found = migrating.current(database)
    document = {"version": found, "needed": migrating.head(), "schema": database.schema.name}
    options.show(document, found or "no tables", as_json=as_json)


@app.command()
def check(
    role: Annotated[Purpose, typer.Option("--role", help="What the role of EO_DATABASE_URL is for.")] = "app",
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Exit with 3 unless the tables are the ones this release needs and the role may use them."""
    database = reach.server(options.start(assignments), wait=not no_wait)
    version = migrating.check(database)
    readiness.check_rights(database, role)
    options.show({"version": version, "schema": database.schema.name}, f"version {version}: good", as_json=as_json)


@app.command("grants")
def grants_(
    owner: Annotated[str | None, typer.Option("--owner", metavar="ROLE", help="Owns the tables.")] = None,
    app_role: Annotated[
        str | None, typer.Option("--app", metavar="ROLE", help="eo run, app.publish, operators.")
    ] = None,
    relay: Annotated[str | None, typer.Option("--relay", metavar="ROLE", help="eo relay.")] = None,
    observer: Annotated[str | None, typer.Option("--observer", metavar="ROLE", help="Reads; no payloads.")] = None,
    payloads: Annotated[bool, typer.Option("--payloads", help="The observer reads payloads and errors too.")] = False,
    joined: Annotated[bool, typer.Option("--joined", help="The tables belong to your own alembic chain.")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Do it, in one transaction.")] = False,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Print the SQL that gives existing roles the rights they need and no others; needs no database without --apply.

    To be said again after each upgrade that brings new tables.
    """
    roles = Roles(owner=owner, app=app_role, relay=relay, observer=observer)
    settings = options.start(assignments)
    schema = Schema(settings.database_schema)
    document: dict[str, object] = {"schema": schema.name, "applied": apply, "roles": dataclasses.asdict(roles)}
    document["statements"] = grants.statements(schema, roles, payloads=payloads, joined=joined)
    document["notes"] = grants.notes(roles)
    text = grants.script(schema, roles, payloads=payloads, joined=joined)
    if apply:
        database = reach.server(settings, wait=not no_wait)
        if roles.given():
            migrating.check(database)
        grants.apply(database, roles, payloads=payloads)
        text = "\n".join(
            f"{role}: has what {purpose} needs, and nothing else" for purpose, role in roles.given().items()
        )
        text = "\n".join(filter(None, [text, f"{owner}: owns schema {schema.name}" if owner else ""]))
    options.show(document, text, as_json=as_json)


@app.command()
def adopt(
    meaning: Annotated[
        Meaning, typer.Argument(help="replacement: the one it comes from is used no more; copy: it lives on.")
    ],
    yes: filters.Yes = False,
    actor: filters.Actor = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Say what a copied or restored database is; until then `eo run` and `eo relay` refuse to use it.

    A replacement keeps everything. A copy loses what the original will do itself: positions, parked messages and what
    waits in the outbox; it gets an outbox of its own.
    """
    database = reach.database(options.start(assignments), wait=not no_wait)
    if meaning == "copy":
        confirm(f"Delete positions, parked messages and outbox of {readiness.where(database)}?", yes=yes)
    done = adopting.adopt(database, meaning, actor=whoever(actor))
    document: dict[str, object] = {
        "as": meaning,
        "from": done.before.stored,
        "home": done.after.stored,
        "outbox": str(done.after.outbox_id),
        "deleted": dict(done.deleted),
    }
    text = f"{meaning} of {done.before.stored}; its home is {done.after.stored}"
    if done.before == done.after:
        text = f"it is at home, {done.after.stored}: nothing was changed"
    if meaning == "copy":
        text += "".join(f"\n{count} {what} deleted" for what, count in done.deleted.items() if count)
        text += f"\nits outbox is {done.after.outbox_id} now; make its checkpoint topic: eo topics apply MODULE:APP"
    options.show(document, text, as_json=as_json)


@app.command()
def sql(revision: Revision = "head", assignments: options.Set = None) -> None:
    """Print the SQL of an upgrade, for a DBA to apply; needs no database. FROM:TO prints a part."""
    _refuse_an_app(revision, ranges=True)
    settings = options.start(assignments)
    options.show(None, migrating.sql(Schema(settings.database_schema), revision).rstrip(), as_json=False)
