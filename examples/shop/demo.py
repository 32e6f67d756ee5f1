"""The demonstration: place thousands of orders while workers and relays are killed and frozen; mend; then count.

Some orders fail and are retried; some are for a sku the warehouse does not have, and die, as do records that nobody can
read. After the storm the sku is added and the dead orders are replayed, by a command that is killed half-way too.

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

from confluent_kafka import Producer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from eoframework import dead, dev
from examples.shop import account, reconcile
from examples.shop.app import Base, Item, Product, app, orders, place_order
from examples.shop.processes import APP, Role, eo, eo_started, shop_processes

SKUS = [f"sku-{number:02d}" for number in range(40)]
NEW_SKUS = ["sku-new-1", "sku-new-2"]
"""Sold, but not in the warehouse yet."""
POISON_EVERY = 50
UNREADABLE = 3
SESSION_TIMEOUT = 6.0
DRAIN_SECONDS = 90.0
REPLAY_SECONDS = 4.0

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
        os.environ.update(services.environment(), EO_DATABASE_SCHEMA="eo")
        engine = create_engine(services.database_url)
        with console.status("applying migrations, creating topics ..."):
            # After a kill, as many messages of each partition as a batch holds run one by one; here kills never stop.
            environment = {**os.environ, "EO_RELAY_LEASE": "3", "EO_MAX_BATCH": "50"}
            # One broker means one replica, which `topics apply` rightly warns of; here it is what we asked for.
            quiet = {**environment, "EO_LOG_LEVEL": "error"}
            eo("db", "upgrade", environment=quiet)
            eo("topics", "apply", APP, environment=quiet)
            _open_shop(engine)
        roles = shop_processes(environment, directory / "logs")
        console.print(f"Kafka and PostgreSQL run; two workers and two relays start; seed {options.seed}")
        demo = Demo(engine, services.bootstrap_servers, roles, options, environment, directory / "logs")
        with _processes(roles), demo.progress:
            demo.trade()
            storm = account.after_the_storm(engine)
            demo.mend()
        return _report(demo, storm)


def _open_shop(engine: Engine) -> None:
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add_all(Product(sku=sku) for sku in [*SKUS, *NEW_SKUS])
        _deliver_goods(session, SKUS)
    reconcile.watch_parking(engine)


def _deliver_goods(session: Session, skus: list[str]) -> None:
    session.add_all(Item(sku=sku, free=1_000_000) for sku in skus)


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


# --- trading, killing, waiting, mending ---


@dataclass
class Counts:
    orders: int
    movements: int
    confirmations: int
    dead: int
    parked: int

    def drained(self, *, letters: int) -> bool:
        """Every order has its effects, but for so many dead letters; nothing waits."""
        return (
            self.parked == 0
            and self.dead == letters
            and self.movements == self.confirmations == self.orders - (letters - UNREADABLE)
        )


class Demo:
    """The running shop and what is done to it."""

    def __init__(
        self,
        engine: Engine,
        bootstrap_servers: str,
        roles: list[Role],
        options: Options,
        environment: dict[str, str],
        logs: Path,
    ) -> None:
        self.engine = engine
        self.bootstrap_servers = bootstrap_servers
        self.roles = roles
        self.logs = logs
        self.replays_killed = 0
        self._options = options
        self._environment = environment
        self._rng = random.Random(options.seed)
        columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        total, poison = options.orders, options.orders // POISON_EVERY + UNREADABLE
        self._bars = {
            "orders": self.progress.add_task("orders placed", total=total),
            "movements": self.progress.add_task("stock reserved", total=total),
            "confirmations": self.progress.add_task("reservations confirmed", total=total),
            "dead": self.progress.add_task("dead letters", total=poison),
        }

    def trade(self) -> None:
        """Two writers place the orders at an even rate while the chaos goes on; then everything may drain."""
        stop = threading.Event()
        writers = [threading.Thread(target=self._write, args=(writer, stop)) for writer in (0, 1)]
        try:
            for writer in writers:
                writer.start()
            self._torment(writers)
        finally:
            stop.set()
            for writer in writers:
                writer.join()
        self._wait_until_drained(letters=self._poison() + UNREADABLE)

    def mend(self) -> None:
        """Put the new skus into the warehouse and replay their orders; the command and a worker are killed half-way."""
        poison = self._poison()
        with Session(self.engine) as session, session.begin():
            _deliver_goods(session, NEW_SKUS)
        self.progress.console.print(f"  {', '.join(NEW_SKUS)} delivered to the warehouse; replaying", highlight=False)
        rate = max(1.0, poison / REPLAY_SECONDS)
        command = ("dead", "replay", APP, "--all", "--error", "Reject", "--yes", "--rate", str(rate))
        with eo_started(*command, environment=self._environment, log=self.logs / "replay.log") as replay:
            while replay.poll() is None and len(reconcile.replayed(self.engine)) < poison // 3:
                self._look()
                time.sleep(0.05)
            if replay.poll() is None:
                replay.kill()
                self.replays_killed += 1
                self.progress.console.print("  [red]SIGKILL[/] eo dead replay", highlight=False)
        self._strike(self.roles[0])
        # Said again, and not from the command line this time: what has been replayed is not replayed again.
        dead.replay_all(app, dead.DeadFilter(error="Reject"))
        self._wait_until_drained(letters=UNREADABLE)

    def _write(self, writer: int, stop: threading.Event) -> None:
        options, rng = self._options, random.Random(self._options.seed + writer + 1)
        share = options.orders // 2
        began = time.monotonic()
        for number in range(1, share + 1):
            due = began + options.seconds * number / share
            if stop.wait(max(0.0, due - time.monotonic())):
                return
            with Session(self.engine) as session:
                skus = NEW_SKUS if number % POISON_EVERY == 0 else SKUS
                place_order(session, rng.choice(skus), rng.randint(1, 5))
                # Some change their mind: a rolled-back order must leave no message either.
                session.rollback() if rng.random() < 0.02 else session.commit()

    def _torment(self, writers: list[threading.Thread]) -> None:
        seconds, rng = self._options.seconds, self._rng
        began = time.monotonic()
        next_blow, paused = 4.0, False
        while (elapsed := time.monotonic() - began) < seconds or any(writer.is_alive() for writer in writers):
            self._look()
            if elapsed > seconds * 1.5:
                return  # a slow machine: fewer orders will do
            if not paused and elapsed > seconds * 0.3:
                paused = True
                self._freeze()
                self._write_nonsense()
            if next_blow < elapsed < seconds:
                next_blow = elapsed + rng.uniform(1.5, 3.0)
                self._strike(rng.choice(self.roles))
            time.sleep(0.25)

    def _wait_until_drained(self, *, letters: int) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        while not self._look().drained(letters=letters) or any(role.paused for role in self.roles):
            if time.monotonic() > deadline:
                self.progress.console.print("[red]not drained in time; counting what is there")
                return
            time.sleep(0.25)

    def _look(self) -> Counts:
        """Whoever is down is started again, and the bars follow."""
        for role in self.roles:
            role.keep_running()
        counts = _counts(self.engine)
        for name, bar in self._bars.items():
            self.progress.update(bar, completed=getattr(counts, name))
        return counts

    def _strike(self, role: Role) -> None:
        if role.kill():
            self.progress.console.print(f"  [red]SIGKILL[/] {role.name}", highlight=False)

    def _freeze(self) -> None:
        for role in (self.roles[0], self.roles[2]):
            seconds = SESSION_TIMEOUT * 2
            role.pause(seconds)
            self.progress.console.print(
                f"  [magenta]SIGSTOP[/] {role.name} for {seconds:.0f} s, past its session timeout and lease",
                highlight=False,
            )

    def _write_nonsense(self) -> None:
        """Somebody else's program writes into our topic what no order can be read from, under keys of ours."""
        settings = {"partitioner": "murmur2_random", "enable.idempotence": True}
        producer = Producer({"bootstrap.servers": self.bootstrap_servers, **settings})
        for number in range(UNREADABLE):
            producer.produce(orders.name, key=SKUS[number], value=b"not an order")
        if producer.flush(30):
            raise RuntimeError("Kafka did not take the unreadable records within 30 s")

    def _poison(self) -> int:
        return sum(order.sku in NEW_SKUS for order in reconcile.committed_orders(self.engine))


def _counts(engine: Engine) -> Counts:
    tables = ("shop_order", "shop_movement", "shop_confirmation", "eo.dead_letter", "eo.parked_message")
    counted = ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
    with engine.connect() as connection:
        # In one statement: what moves from one table to the next between two would be in neither.
        return Counts(*connection.execute(text(f"SELECT {counted}")).one())


# --- the account ---


def _report(demo: Demo, storm: account.Storm) -> int:
    with console.status("reading the database and the topics ..."):
        found = account.at_the_end(demo.engine, demo.bootstrap_servers, storm, poison_skus=NEW_SKUS)
    console.print(*found.tables(), sep="\n")
    kills = sum(role.kills for role in demo.roles) + demo.replays_killed
    struck = f"{kills} SIGKILL, {sum(role.pauses for role in demo.roles)} SIGSTOP"
    console.print(f"{struck}; stock taken {found.taken}, ordered {found.ordered}", highlight=False)
    for wrong in found.wrong:
        console.print(f"[red]{escape(wrong)}", highlight=False)
    console.print("[bold green]every order counted once, everywhere" if found.clean else "[bold red]NOT exactly once")
    if not found.clean:
        kept = Path(tempfile.mkdtemp(prefix="eo-demo-logs-"))
        demo.logs.rename(kept / "logs")
        console.print(f"the processes' logs are kept in {kept}")
    return 0 if found.clean else 1


if __name__ == "__main__":
    sys.exit(main())
