"""The demo's account: what was found after the storm and at the end, held against what must be, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table
from sqlalchemy import Engine

from examples.shop import reconcile
from examples.shop.app import delays, orders, refusals, reservations
from examples.shop.reconcile import Entry, Letter, Row

RESERVE, CONFIRM = "shop.reserve", "shop.confirm"


@dataclass(frozen=True)
class Storm:
    """What there was when everything had drained and nothing was mended yet."""

    dead: list[Letter]
    effects: list[Entry]
    parked: Counter[str]


@dataclass(frozen=True)
class Account:
    """What there is at the end."""

    sent: int
    rows: list[Row]
    retried: dict[str, int]
    """By consumer: messages that took more than one attempt."""
    parked: Counter[str]
    dead: Counter[str]
    replayed: Counter[str]
    left: list[Letter]
    taken: int
    ordered: int
    wrong: list[str]

    @property
    def clean(self) -> bool:
        return bool(self.sent) and all(row.clean for row in self.rows) and not self.wrong

    def tables(self) -> list[Table]:
        """The account for people."""
        return [self._counted(), self._dead()]

    def _counted(self) -> Table:
        table = _table(f"{self.sent} orders committed (sent)")
        for column in ("found", "lost", "doubled", "out of\norder\nper key", "retried", "parked", "dead", "replayed"):
            table.add_column(column, justify="right")
        for row in self.rows:
            numbers = [row.found, row.lost, row.doubled, row.reordered]
            if row.consumer:
                counters = (self.retried, self.parked, self.dead, self.replayed)
                numbers += [counter[row.consumer] for counter in counters]
            table.add_row(row.place, *map(str, numbers), style="green" if row.clean else "red")
        return table

    def _dead(self) -> Table:
        table = _table("dead letters that stay")
        table.add_column("cause", overflow="fold")
        for letter in self.left:
            partition, offset = letter.place
            table.add_row(f"{letter.consumer} {orders.name}\\[{partition}]@{offset}", escape(letter.cause))
        return table


def after_the_storm(engine: Engine) -> Storm:
    """What the failures of the storm have left."""
    return Storm(
        reconcile.dead_letters(engine), reconcile.from_table(engine, "shop_movement"), reconcile.parked(engine)
    )


def at_the_end(engine: Engine, bootstrap_servers: str, storm: Storm, *, poison_skus: Collection[str]) -> Account:
    """Count everything, and hold it against what was sent and what had died."""
    sent = reconcile.committed_orders(engine)
    placed = reconcile.from_topic(bootstrap_servers, orders.name)
    reserved = reconcile.from_topic(bootstrap_servers, reservations.name)
    movements = reconcile.from_table(engine, "shop_movement")
    confirmations = reconcile.from_table(engine, "shop_confirmation")
    left, replayed = reconcile.dead_letters(engine), reconcile.replayed(engine)
    taken, ordered = reconcile.stock_taken(engine)
    poison = [order.order_id for order in sent if order.sku in poison_skus]
    consumers = {letter.id: letter.consumer for letter in storm.dead}
    return Account(
        sent=len(sent),
        rows=[
            reconcile.compare("orders topic", sent, placed.entries),
            reconcile.compare("stock movements", sent, movements, consumer=RESERVE),
            reconcile.compare("reservations topic", sent, reserved.entries),
            reconcile.compare("confirmations", sent, confirmations, consumer=CONFIRM),
        ],
        retried={
            RESERVE: sum(entry.attempt > 1 for entry in movements),
            CONFIRM: sum(entry.attempt > 1 for entry in confirmations),
        },
        parked=storm.parked,
        dead=Counter(consumers.values()),
        replayed=Counter(consumers.get(number, "unknown") for number in replayed),
        left=left,
        taken=taken,
        ordered=ordered,
        wrong=[
            *reconcile.wrong_about_dead(poison, placed.unreadable, storm.dead),
            *reconcile.wrong_about_effects(storm.effects, poison),
            *reconcile.wrong_about_replayed(storm.dead, replayed, left),
            *reconcile.wrong_about_attempts("stock movements", movements, refusals),
            *reconcile.wrong_about_attempts("confirmations", confirmations, delays),
            *([] if taken == ordered else [f"stock taken {taken}, ordered {ordered}"]),
        ],
    )


def _table(title: str) -> Table:
    # Narrow: it must fit into 80 columns.
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("place", no_wrap=True)
    return table
