"""`eo`: parses, calls, prints. A command's module is loaded only when that command is asked for.

That is the one lazy import there is: SQLAlchemy, pydantic and the Kafka client take 0.6 s, and `eo --help` needs none.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import typer

from eoframework.errors import EoError
from eoframework.lifecycle import exit_code

COMMANDS = {
    "run": "Run an app's handlers.",
    "relay": "Publish the outbox to Kafka.",
    "dev": "A real Kafka and PostgreSQL for development.",
    "db": "eoframework's tables: upgrade, current, check, grants, sql, downgrade.",
    "topics": "An app's topics: plan, apply.",
    "publish": "Publish JSON lines from standard input through the outbox.",
    "dead": "Messages that failed for good, or wait: ls, show, try, replay, discard.",
    "outbox": "What Kafka refused or has yet to get: ls, show, retry, discard, stats.",
    "position": "Where consumers stand: show, set, forget.",
    "reprocess": "Send a range of a topic through a handler again.",
    "external": "Calls outside the database that nobody knows about: ls, resolve.",
    "crashtest": "Kill your own app at each point of its flow, and compare.",
}

_EPILOG = (
    "Exit codes: 0 done, or drained on SIGTERM or the first Ctrl-C; 1 unexpected error; 2 usage; "
    "3 configuration or schema; 4 findings; 5 not found; 69 Kafka or PostgreSQL unreachable; "
    "70 stopped to protect data; 75 start it again; 130/143 forced stop."
)


def main() -> None:
    """The program `eo`."""
    sys.exit(invoke(sys.argv[1:]))


def invoke(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code (DESIGN.md, "Exit codes")."""
    try:
        _build(arguments)(args=list(arguments), prog_name="eo")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except EoError as error:
        _say(f"eo: {error}")
        return exit_code(error)
    except Exception:  # noqa: BLE001 - the outermost frame: whatever it is, it is shown, without secrets
        _say(traceback.format_exc().rstrip())
        return exit_code(Exception())
    return 0


def _build(arguments: Sequence[str]) -> typer.Typer:
    app = typer.Typer(
        name="eo",
        help="Exactly-once processing on Apache Kafka and PostgreSQL.",
        epilog=_EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,  # they show local variables, and with them secrets
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    asked_for = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name != asked_for:
            app.command(name, help=summary)(_not_loaded)
            continue
        module = import_module(f"eoframework.cli.{name}")
        if hasattr(module, "app"):
            app.add_typer(module.app, name=name, help=summary)
        else:
            app.command(name, help=summary)(module.command)
    return app


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(import_module("importlib.metadata").version("eoframework"))
        raise typer.Exit()


def _root(
    version: bool = typer.Option(False, "--version", help="Show the version.", is_eager=True, callback=_show_version),
) -> None:
    """The options before a command."""


def _not_loaded() -> None:
    """Stands in the list of commands for one that was not asked for."""


def _say(text: str) -> None:
    try:
        text = import_module("eoframework.logs").redact(text)
    except ImportError as error:
        # Unredacted it must not be shown, whatever is broken.
        text = f"eo: an error that cannot be shown: {error.name} is missing; install eoframework again."
    typer.echo(text, err=True)
