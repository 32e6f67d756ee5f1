"""`eo dev`: the development services from the command line."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from eoframework import dev
from eoframework.dev import docker_stack, processes, stack
from eoframework.dev.kafka import NUMBERS_OF_BROKERS
from eoframework.errors import EoError, NotFound

app = typer.Typer(
    no_args_is_help=True,
    help="A real Kafka broker and a real PostgreSQL server for development, without Docker (or with it: up --docker).",
)

StateDirectory = Annotated[
    Path, typer.Option("--state-dir", help="Where the services keep everything they have.", show_default=True)
]


def _one_or_three(brokers: int | None) -> int | None:
    if brokers is not None and brokers not in NUMBERS_OF_BROKERS:
        raise typer.BadParameter(f"{brokers} brokers are not offered; use 1, or 3 to see a failover.")
    return brokers


Brokers = Annotated[
    int | None,
    typer.Option(
        metavar="1|3",
        callback=_one_or_three,
        help="How many Kafka brokers; 3 replicate for each other (default: as many as there are, else 1).",
    ),
]
KafkaPort = Annotated[
    int | None,
    typer.Option(help="Kafka's port (default: a free one); of three brokers the first one's.", min=1, max=65535),
]
PostgresPort = Annotated[int | None, typer.Option(help="PostgreSQL's port (default: a free one).", min=1, max=65535)]
Docker = Annotated[
    bool,
    typer.Option(
        "--docker", help="In containers, by docker-compose.yml; remembered for this directory until `eo dev reset`."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
DEFAULT = stack.DEFAULT_STATE_DIRECTORY


@app.command()
def up(
    state_dir: StateDirectory = DEFAULT,
    brokers: Brokers = None,
    kafka_port: KafkaPort = None,
    postgres_port: PostgresPort = None,
    docker: Docker = False,
    as_json: Json = False,
) -> None:
    """Start Kafka and PostgreSQL, or find the running ones, and print the two settings: `eval "$(eo dev up)"`."""
    services = _started(state_dir, brokers, kafka_port, postgres_port, in_containers=docker, bound_to_parent=False)
    if as_json:
        document = {**services.environment(), "found_running": services.found_running, "log_directory": str(state_dir)}
        typer.echo(json.dumps(document))
        return
    for name, value in services.environment().items():
        typer.echo(f"export {name}={shlex.quote(value)}")


@app.command()
def down(state_dir: StateDirectory = DEFAULT) -> None:
    """Stop all services; their data stay."""
    stopped = docker_stack.down(state_dir) if docker_stack.chosen(state_dir) else dev.down(state_dir)
    typer.echo("Stopped; the data are kept." if stopped else "Nothing was running.", err=True)


@app.command()
def status(state_dir: StateDirectory = DEFAULT, as_json: Json = False) -> None:
    """Tell what runs; exit 0 when all services do, 69 otherwise."""
    found = docker_stack.status(state_dir) if docker_stack.chosen(state_dir) else dev.status(state_dir)
    if as_json:
        typer.echo(json.dumps({service.name: asdict(service) for service in found}))
    else:
        for service in found:
            typer.echo(_line(service))
    if any(service.state != "running" for service in found):
        raise typer.Exit(69)


@app.command()
def reset(state_dir: StateDirectory = DEFAULT) -> None:
    """Stop all services and delete their data."""
    deleted = docker_stack.reset(state_dir) if docker_stack.chosen(state_dir) else dev.reset(state_dir)
    typer.echo("Stopped and deleted." if deleted else "There was nothing to delete.", err=True)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The command and its arguments.")],
    state_dir: StateDirectory = DEFAULT,
    brokers: Brokers = None,
    kafka_port: KafkaPort = None,
    postgres_port: PostgresPort = None,
) -> None:
    """Run a command with the services for as long as it lives; exits with its exit code.

    The services end with it, however this process ends (containers: unless it is killed); services that ran before are
    used and left running.
    """
    program = shutil.which(command[0])
    if program is None:
        raise NotFound(f"The command {command[0]!r} is not found.", remedy="Check its name and PATH.")
    services = _started(state_dir, brokers, kafka_port, postgres_port, in_containers=False, bound_to_parent=True)
    with services:
        code = _run_in_foreground([program, *command[1:]], services.environment())
    raise typer.Exit(code)


def _started(
    state_dir: Path,
    brokers: int | None,
    kafka_port: int | None,
    postgres_port: int | None,
    *,
    in_containers: bool,
    bound_to_parent: bool,
) -> dev.Services | docker_stack.ContainerServices:
    with _Screen() as screen:
        if docker_stack.chosen(state_dir, asked=in_containers):
            if brokers not in (None, 1):
                raise typer.BadParameter("containers offer one broker; leave --docker out for three.")
            contained = docker_stack.start(
                state_dir, kafka_port=kafka_port, postgres_port=postgres_port, watcher=screen
            )
            where = f"containers of {contained.project}"
            screen.running("Kafka and PostgreSQL", where, already=contained.found_running)
            return contained
        services = dev.start(
            state_dir,
            kafka=dev.KafkaOptions(brokers=brokers, port=kafka_port),
            postgres=dev.PostgresOptions(port=postgres_port),
            bound_to_parent=bound_to_parent,
            watcher=screen,
        )
        nodes = len(services.cluster.nodes)
        kafka = "Kafka" if nodes == 1 else f"{nodes} Kafka brokers"
        where = f"state in {services.directory.path}"
        screen.running(f"{kafka} and PostgreSQL", where, already=services.found_running)
        return services


def _run_in_foreground(command: list[str], environment: dict[str, str]) -> int:
    # Ctrl-C reaches the command by itself, being in the same terminal: it decides what that means, we wait for it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    plan = processes.Plan(command=command, environment=environment, foreground=True, grace=10.0)
    guarded = processes.spawn(plan)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        processes.send(guarded.identity, signal.Signals(number))

    terminated = signal.signal(signal.SIGTERM, pass_on)
    try:
        return guarded.wait()
    finally:
        guarded.end()
        signal.signal(signal.SIGTERM, terminated)
        signal.signal(signal.SIGINT, before)


def _line(service: dev.ServiceStatus) -> str:
    line = f"{service.name:<9} {service.state:<8}"
    if service.state == "dead":
        return f"{line} {service.cause}  (log {service.log}; `eo dev up` starts it again)"
    if service.state == "stopped":
        return line
    process = f"pid {service.pid}" if service.pid else "a container"
    return f"{line} port {service.port}, {process}, log {service.log}"


class _Screen:
    """Progress for the person who waits: moving on a terminal, one line a stage otherwise; always on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[size]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._moving = self._console.is_terminal
        self._lock = threading.Lock()
        self._stage: TaskID | None = None
        self._download: TaskID | None = None

    def __enter__(self) -> _Screen:
        if self._moving:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._moving:
            self._progress.stop()

    def stage(self, what: str, /) -> None:
        """Show what began."""
        if not self._moving:
            typer.echo(f"{what} …", err=True)
        elif self._stage is None:
            self._stage = self._progress.add_task(what, total=None, size="")
        else:
            self._progress.update(self._stage, description=what)

    def downloaded(self, done: int, total: int, /) -> None:
        """Show how far the download is."""
        with self._lock:
            if self._download is None:
                self._download = self._progress.add_task(
                    "downloading Kafka's jars, once per user", total=total, size=""
                )
                if not self._moving:
                    typer.echo(f"downloading Kafka's jars, {total / 1e6:.0f} MB, once per user …", err=True)
            self._progress.update(self._download, completed=done, size=f"{done / 1e6:.0f}/{total / 1e6:.0f} MB")

    def running(self, what: str, where: str, *, already: bool) -> None:
        """Say that the services run, and where."""
        typer.echo(f"{what} are {'already running' if already else 'running'} ({where}).", err=True)


def main() -> NoReturn:
    """Run `eo dev` by itself."""
    try:
        app(standalone_mode=True)
    except EoError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    sys.exit(0)


if __name__ == "__main__":
    main()
