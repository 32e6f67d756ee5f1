"""`eo relay`: the outbox to Kafka."""

from __future__ import annotations

import threading
from typing import Annotated, Literal

import typer

from eoframework import bootstrap, lifecycle
from eoframework.cli import options


def command(
    reference: options.Reference,
    mode: Annotated[
        Literal["transactional", "idempotent"] | None,
        typer.Option("--mode", help="idempotent: for clusters without transactions; at least once."),
    ] = None,
    once: options.Once = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Publish the outbox of an app's database; run as many as you like, they share its shards."""
    options.start([*(assignments or []), *([f"relay_mode={mode}"] if mode else [])])
    stop = threading.Event()
    with lifecycle.signals(stop):
        code = _work(reference, stop, once=once, wait=not no_wait)
    raise typer.Exit(code)


def _work(reference: str, stop: threading.Event, *, once: bool, wait: bool) -> int:
    ready = bootstrap.prepare(bootstrap.load_app(reference), stop=stop, wait=wait)
    if ready is None:
        return 0
    bootstrap.log_relay_banner(ready)
    return lifecycle.run(bootstrap.relay_workers(ready), stop=stop, once=once)
