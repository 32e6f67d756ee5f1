"""`eo publish`: JSON lines through the outbox."""

from __future__ import annotations

import sys
import threading
from typing import Annotated

import typer

from eoframework import bootstrap, ops
from eoframework.cli import options


def command(
    reference: options.Reference,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="One of the app's topics.")],
    key: Annotated[str | None, typer.Option("--key", help="Instead of the topic's own key.")] = None,
    as_json: options.Json = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Publish each line of standard input, JSON of the topic's payload; all in one database transaction, or none."""
    options.start(assignments)
    app = bootstrap.load_app(reference)
    ops.find_topic(app, topic)
    bootstrap.open_database(app, stop=threading.Event(), wait=not no_wait)
    count = ops.publish_lines(app, topic, sys.stdin.buffer, key=key)
    options.show({"topic": topic, "published": count}, f"{count} messages in the outbox for {topic}", as_json=as_json)
