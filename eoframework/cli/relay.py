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
    shards: Annotated[
        str | None,
        typer.Option("--shards", metavar="0,1,...", help="Only these; then name every shard in some process."),
    ] = None,
    once: options.Once = False,
    no_wait: options.NoWait = False,
    assignments: options.Set = None,
) -> None:
    """Publish the outbox of an app's database; run as many as you like, they share its shards."""
    options.start([*(assignments or []), *([f"relay_mode={mode}"] if mode else [])])
    only = _numbers(shards)
    stop = threading.Event()
    with lifecycle.signals(stop):
        code = _work(reference, stop, only, once=once, wait=not no_wait)
    raise typer.Exit(code)


def _numbers(shards: str | None) -> frozenset[int] | None:
    if shards is None:
        return None
    try:
        return frozenset(int(number) for number in shards.split(","))
    except ValueError as error:
        raise typer.BadParameter("write shard numbers with commas, such as 0,1", param_hint="--shards") from error


def _work(reference: str, stop: threading.Event, only: frozenset[int] | None, *, once: bool, wait: bool) -> int:
    ready = bootstrap.prepare(bootstrap.load_app(reference), stop=stop, wait=wait, purpose="relay")
    if ready is None:
        return 0
    bootstrap.log_relay_banner(ready)
    workers = bootstrap.relay_workers(ready, shards=only)
    lifecycle.spare_the_collector()
    return lifecycle.run(workers, stop=stop, once=once)
