"""`eo run`: an app's handlers and transforms, in this process or in several."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Annotated

import typer

from eoframework import bootstrap, lifecycle
from eoframework.cli import options
from eoframework.supervisor import Supervisor, python_command


def command(
    reference: options.Reference,
    handler: Annotated[
        list[str] | None, typer.Option("--handler", help="Only this handler or transform; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes to run.")] = 1,
    once: options.Once = False,
    no_wait: options.NoWait = False,
    adopt_offsets: Annotated[
        bool, typer.Option("--adopt-offsets", help="Begin at the group's offsets where the database knows no position.")
    ] = False,
    assignments: options.Set = None,
    worker_index: options.WorkerIndex = None,
) -> None:
    """Run an app's handlers, each message in one database transaction; its transforms, each batch in one of Kafka."""
    options.start(assignments)
    if workers > 1:
        flags = _flags(handler or [], assignments or [], once=once, no_wait=no_wait, adopt_offsets=adopt_offsets)
        raise typer.Exit(_supervise([reference, *flags], workers, once=once))
    stop = threading.Event()
    with lifecycle.signals(stop):
        if worker_index is not None:
            lifecycle.stop_when_orphaned(stop)
        work = _Work(
            reference, handler or [], once=once, wait=not no_wait, adopt_offsets=adopt_offsets, index=worker_index
        )
        code = work.run(stop)
    raise typer.Exit(code)


@dataclass(frozen=True)
class _Work:
    """What was asked for, for this process."""

    reference: str
    names: list[str]
    once: bool
    wait: bool
    adopt_offsets: bool
    index: int | None
    """Which of several workers this is."""

    def run(self, stop: threading.Event) -> int:
        app = bootstrap.load_app(self.reference)
        chosen = bootstrap.choose(app, self.names)
        ready = bootstrap.prepare(app, stop=stop, wait=self.wait)
        if ready is None:
            return 0
        bootstrap.check_topics(ready, chosen, self.reference)
        if not self.index:
            bootstrap.log_run_banner(ready, chosen)
        workers = bootstrap.run_workers(
            ready, chosen, stop=stop, once=self.once, adopt_offsets=self.adopt_offsets, worker_index=self.index
        )
        lifecycle.spare_the_collector()
        return lifecycle.run(workers, stop=stop, once=self.once)


def _supervise(arguments: list[str], workers: int, *, once: bool) -> int:
    stop = threading.Event()
    supervisor = Supervisor(python_command("run", *arguments), workers=workers, once=once)
    with lifecycle.signals(stop, at_once=supervisor.kill):
        return supervisor.run(stop)


def _flags(handlers: list[str], assignments: list[str], *, once: bool, no_wait: bool, adopt_offsets: bool) -> list[str]:
    flags = [part for name in handlers for part in ("--handler", name)]
    flags += [part for assignment in assignments for part in ("--set", assignment)]
    given = {"--once": once, "--no-wait": no_wait, "--adopt-offsets": adopt_offsets}
    return flags + [flag for flag, is_given in given.items() if is_given]
