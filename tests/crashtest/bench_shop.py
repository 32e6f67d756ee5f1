"""Handlers for the fixture `eo`: some as they should be, some with the bugs it is there to find."""

from __future__ import annotations

import os
import urllib.request
from contextlib import suppress

from pydantic import BaseModel
from sqlalchemy import create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from eoframework import App, External, ExternalCall, Message, Out, Reject, Retry, Topic, Tx


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "bench_item"
    sku: Mapped[str] = mapped_column(primary_key=True)
    free: Mapped[int]


class Note(Base):
    __tablename__ = "bench_note"
    id: Mapped[int] = mapped_column(primary_key=True)
    said: Mapped[str]


class Placed(BaseModel):
    order_id: int
    sku: str


class Reserved(BaseModel):
    order_id: int


orders = Topic("bench.orders.v1", Placed, key="sku", id="order_id")
reserved = Topic("bench.reserved.v1", Reserved, key="order_id")
refused = Topic("bench.refused.v1", Placed, key="sku")
app = App("bench")
solid = App("bench-solid")


@app.handler(orders)
def reserve(order: Placed, tx: Tx) -> None:
    item = tx.session.get(Item, order.sku, with_for_update=True)
    if item is None:
        raise Reject(f"no {order.sku}")
    item.free -= 1
    tx.session.add(Note(said=f"reserved {order.order_id}"))
    tx.publish(reserved, Reserved(order_id=order.order_id))


@solid.batch_handler(orders)
def book(batch: list[Message[Placed]], tx: Tx) -> None:
    tx.session.add_all(Note(said=f"booked {message.payload.order_id}") for message in batch)


@solid.transform(orders, to={reserved, refused})
def sort(order: Placed) -> Reserved | Out[Placed]:
    return Out(refused, order) if order.sku == "gone" else Reserved(order_id=order.order_id)


@app.handler(orders, retry=Retry(attempts=4))
def third_time(message: Message[Placed], tx: Tx) -> None:
    if message.attempt < 3:
        raise ValueError(f"attempt {message.attempt}")
    tx.session.add(Note(said=f"attempt {message.attempt}"))


@app.handler(orders, retry=Retry(attempts=2), ordering="partition")
def never(order: Placed) -> None:
    raise LookupError(order.sku)


def _charge(message: Message[Placed], call: ExternalCall) -> int:
    return message.payload.order_id * 100


@app.handler(orders, external=[External("charge", _charge)])
def paid(order: Placed, tx: Tx) -> None:
    tx.session.add(Note(said=f"paid {tx.external('charge')}"))


# --- with a bug ---

COUNT = 0


@app.handler(orders)
def counts(order: Placed, tx: Tx) -> None:
    global COUNT
    COUNT += 1
    tx.session.add(Note(said=f"{order.order_id} is number {COUNT}"))


@app.handler(orders)
def writes_elsewhere(order: Placed, tx: Tx) -> None:
    engine = create_engine(os.environ["EO_DATABASE_URL"])
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO bench_note (said) VALUES ('elsewhere')"))
    engine.dispose()


@app.handler(orders)
def calls_out(order: Placed) -> None:
    with suppress(OSError):
        urllib.request.urlopen("http://127.0.0.1:9/charge", timeout=1)


@app.handler(orders)
def says_it_once(order: Placed, tx: Tx) -> None:
    if not hasattr(says_it_once, "said"):
        says_it_once.said = True  # type: ignore[attr-defined]
        tx.session.add(Note(said="first"))


@solid.transform(orders, to=reserved)
def numbers(order: Placed) -> Out[Reserved]:
    numbers.calls = getattr(numbers, "calls", 0) + 1  # type: ignore[attr-defined]
    return Out(reserved, Reserved(order_id=order.order_id), id=f"n-{numbers.calls}")  # type: ignore[attr-defined]
