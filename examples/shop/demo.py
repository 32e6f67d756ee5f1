"""The demonstration: place thousands of orders while workers and relays are killed and frozen, then count.

    python -m examples.shop.demo [--orders N] [--seconds S] [--seed N]

Starts a real Kafka broker and a real PostgreSQL server of its own, and stops them at the end. Exit code 0 only if
nothing was lost, doubled or reordered.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from eoframework import dev
from examples.shop import reconcile
from examples.shop.app import Base, Item, orders, place_order, reservations
from examples.shop.processes import APP, Role, eo, shop_processes

SKUS = [f"sku-{number:02d}" for number in range(40)]
SESSION_TIMEOUT = 6.0
DRAIN_SECONDS = 90.0

console = Console()


@dataclass
class Options:
    orders: int
    seconds: float
    seed: int


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="eo-demo-", ignore_cleanup_errors=True) as directory:
        try:
            return _run(options, Path(directory))
        except KeyboardInterrupt:
            console.print("[yellow]stopped; the demo's processes and services are gone")
            return 130


def _options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orders", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=40.0, help="how long processes are killed and orders placed")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    given = parser.parse_args()
    return Options(given.orders, given.seconds, given.seed)


def _run(options: Options, directory: Path) -> int:
    with console.status("starting Kafka and PostgreSQL ..."):
        services = dev.start(directory / ".eo")
    with services:
        # Set before anything reads the settings: this process publishes too.
        os.environ.update(services.environment())
        engine = create_engine(services.database_url)
        with console.status("applying migrations, creating topics ..."):
            environment = {**os.environ, "EO_RELAY_LEASE": "3"}
            # One broker means one replica, which `topics apply` rightly warns of; here it is what we asked for.
            quiet = {**environment, "EO_LOG_LEVEL": "error"}
            eo("db", "upgrade", environment=quiet)
            eo("topics", "apply", APP, environment=quiet)
            _open_shop(engine)
        roles = shop_processes(environment, directory / "logs")
        console.print(f"Kafka and PostgreSQL run; two workers and two relays start; seed {options.seed}")
        with _processes(roles):
            _trade(engine, roles, options)
        return _report(engine, services.bootstrap_servers, roles, directory)


def _open_shop(engine: Engine) -> None:
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add_all(Item(sku=sku, free=1_000_000) for sku in SKUS)


@contextmanager
def _processes(roles: list[Role]) -> Iterator[None]:
    """The processes run; whatever happens, none is left."""
    try:
        for role in roles:
            role.keep_running()
        yield
    finally:
        stoppers = [threading.Thread(target=role.stop) for role in roles]
        for stopper in stoppers:
            stopper.start()
        for stopper in stoppers:
            stopper.join()


# --- trading, killing, waiting ---


def _trade(engine: Engine, roles: list[Role], options: Options) -> None:
    """Two writers place the orders at an even rate while the chaos goes on; then everything may drain."""
    rng = random.Random(options.seed)
    stop = threading.Event()
    writers = [threading.Thread(target=_write, args=(engine, options, writer, stop)) for writer in (0, 1)]
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        try:
            for writer in writers:
                writer.start()
            _torment(engine, roles, options, rng, progress)
        finally:
            stop.set()
            for writer in writers:
                writer.join()


def _write(engine: Engine, options: Options, writer: int, stop: threading.Event) -> None:
    rng = random.Random(options.seed + writer + 1)
    share = options.orders // 2
    began = time.monotonic()
    for number in range(share):
        due = began + options.seconds * number / share
        if stop.wait(max(0.0, due - time.monotonic())):
            return
        with Session(engine) as session:
            place_order(session, rng.choice(SKUS), rng.randint(1, 5))
            # Some change their mind: a rolled-back order must leave no message either.
            session.rollback() if rng.random() < 0.02 else session.commit()


def _torment(engine: Engine, roles: list[Role], options: Options, rng: random.Random, progress: Progress) -> None:
    bars = {
        table: progress.add_task(what, total=options.orders)
        for table, what in (
            ("shop_order", "orders placed"),
            ("shop_movement", "stock reserved"),
            ("shop_confirmation", "reservations confirmed"),
        )
    }
    began = time.monotonic()
    next_blow, paused = 4.0, False
    while True:
        elapsed = time.monotonic() - began
        counts = _counts(engine, list(bars))
        for table, bar in bars.items():
            progress.update(bar, completed=counts[table])
        for role in roles:
            role.keep_running()
        if elapsed < options.seconds:
            if not paused and elapsed > options.seconds * 0.3:
                paused = True
                _freeze(roles, progress)
            if elapsed > next_blow:
                next_blow = elapsed + rng.uniform(1.5, 3.0)
                _strike(rng.choice(roles), progress)
        elif counts["shop_order"] == counts["shop_confirmation"] == counts["shop_movement"] and not any(
            r.paused for r in roles
        ):
            return
        elif elapsed > options.seconds + DRAIN_SECONDS:
            progress.console.print("[red]not drained in time; counting what is there")
            return
        time.sleep(0.25)


def _strike(role: Role, progress: Progress) -> None:
    if role.kill():
        progress.console.print(f"  [red]SIGKILL[/] {role.name}", highlight=False)


def _freeze(roles: list[Role], progress: Progress) -> None:
    for role in (roles[0], roles[2]):
        seconds = SESSION_TIMEOUT * 2
        role.pause(seconds)
        progress.console.print(
            f"  [magenta]SIGSTOP[/] {role.name} for {seconds:.0f} s, past its session timeout and lease",
            highlight=False,
        )


def _counts(engine: Engine, tables: list[str]) -> dict[str, int]:
    with engine.connect() as connection:
        return {table: int(connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0) for table in tables}


# --- the account ---


def _report(engine: Engine, bootstrap_servers: str, roles: list[Role], directory: Path) -> int:
    with console.status("reading the database and the topics ..."):
        sent = reconcile.from_table(engine, "shop_order", id_column="id")
        rows = [
            reconcile.compare("published: orders topic", sent, reconcile.from_topic(bootstrap_servers, orders.name)),
            reconcile.compare("effects: stock movements", sent, reconcile.from_table(engine, "shop_movement")),
            reconcile.compare(
                "published: reservations topic", sent, reconcile.from_topic(bootstrap_servers, reservations.name)
            ),
            reconcile.compare("effects: confirmations", sent, reconcile.from_table(engine, "shop_confirmation")),
        ]
        taken, ordered = reconcile.stock_taken(engine)
    console.print(_table(len(sent), rows))
    kills, pauses = sum(role.kills for role in roles), sum(role.pauses for role in roles)
    console.print(f"{kills} SIGKILL, {pauses} SIGSTOP; stock taken {taken}, ordered {ordered}", highlight=False)
    clean = bool(sent) and all(row.clean for row in rows) and taken == ordered
    console.print("[bold green]every order counted once, everywhere" if clean else "[bold red]NOT exactly once")
    if not clean:
        kept = Path(tempfile.mkdtemp(prefix="eo-demo-logs-"))
        (directory / "logs").rename(kept / "logs")
        console.print(f"the processes' logs are kept in {kept}")
    return 0 if clean else 1


def _table(sent: int, rows: list[reconcile.Row]) -> Table:
    table = Table(title=f"{sent} orders committed (sent)")
    for column in ("place", "found", "lost", "doubled", "out of order per key"):
        table.add_column(column, justify="left" if column == "place" else "right")
    for row in rows:
        style = "green" if row.clean else "red"
        table.add_row(row.place, str(row.found), str(row.lost), str(row.doubled), str(row.reordered), style=style)
    return table


if __name__ == "__main__":
    sys.exit(main())
