"""Three apps, each with a plain bug that `eo crashtest` is there to find, and one without."""

from __future__ import annotations

import urllib.request
from contextlib import suppress
from datetime import datetime

from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from eoframework import App, Retry, Topic, Tx
from eoframework.settings import Settings


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "stock"
    sku: Mapped[str] = mapped_column(primary_key=True)
    free: Mapped[int]


class Booking(Base):
    __tablename__ = "booking"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    sku: Mapped[str]
    number: Mapped[int]


class Bill(Base):
    __tablename__ = "bill"
    order_id: Mapped[int] = mapped_column(primary_key=True)


class Placed(BaseModel):
    order_id: int
    sku: str
    qty: int


class Booked(BaseModel):
    order_id: int


orders = Topic("crash.orders.v1", Placed, key="sku", id="order_id", partitions=2)
booked = Topic("crash.booked.v1", Booked, key="order_id", partitions=1)

sound = App("sound")
elsewhere = App("elsewhere")
counting = App("counting")
calling = App("calling")
sorting = App("sorting")
strict = App("strict")
chained = App("chained")
timed = App("timed")

COUNT = 0


def fill(engine: Engine) -> None:
    """`--setup`: text fields of generated messages are NAME-1 to NAME-5."""
    with engine.begin() as connection:
        for number in range(1, 6):
            connection.execute(text("INSERT INTO stock VALUES (:sku, 1000)"), {"sku": f"sku-{number}"})


def deliver_goods(engine: Engine) -> None:
    """The same for examples.shop, but for one sku that its warehouse does not have."""
    with engine.begin() as connection:
        for number in range(1, 5):
            connection.execute(text("INSERT INTO shop_item VALUES (:sku, 1000)"), {"sku": f"sku-{number}"})


@sound.handler(orders, name="book")
def book(order: Placed, tx: Tx) -> None:
    tx.session.get_one(Stock, order.sku, with_for_update=True).free -= order.qty
    tx.session.add(Booking(order_id=order.order_id, sku=order.sku, number=order.qty))
    tx.publish(booked, Booked(order_id=order.order_id))


@strict.handler(orders, name="book", retry=Retry(attempts=1), breaker=None)
def book_what_is_there(order: Placed, tx: Tx) -> None:
    if tx.session.get(Stock, order.sku) is None:
        raise LookupError(f"no shelf for {order.sku}")


def _tell(order: Placed, tx: Tx) -> None:
    tx.publish(booked, Booked(order_id=order.order_id))


@chained.handler(booked, name="bill")
def bill(order: Booked, tx: Tx) -> None:
    tx.session.add(Bill(order_id=order.order_id))


@chained.handler(orders, name="book")
def book_and_tell(order: Placed, tx: Tx) -> None:
    _tell(order, tx)


@elsewhere.handler(orders, name="book")
def book_on_a_second_connection(order: Placed) -> None:
    engine = create_engine(Settings.load().require_database_url())
    with engine.begin() as connection:
        connection.execute(text("UPDATE stock SET free = free - :qty WHERE sku = :sku"), order.model_dump())
    engine.dispose()


@counting.handler(orders, name="book")
def book_under_a_number(order: Placed, tx: Tx) -> None:
    global COUNT
    COUNT += 1
    tx.session.add(Booking(order_id=order.order_id, sku=order.sku, number=COUNT))


@timed.handler(orders, name="book")
def book_by_the_clock(order: Placed, tx: Tx) -> None:
    tx.session.add(Booking(order_id=order.order_id, sku=order.sku, number=datetime.now().microsecond))


@calling.handler(orders, name="book")
def book_and_charge(order: Placed, tx: Tx) -> None:
    with suppress(OSError):
        urllib.request.urlopen("http://127.0.0.1:9/charge", timeout=1)
    tx.session.add(Booking(order_id=order.order_id, sku=order.sku, number=order.qty))


@sorting.transform(orders, to=booked, name="sort")
def sort(order: Placed) -> Booked | None:
    return Booked(order_id=order.order_id) if order.qty > 1 else None
