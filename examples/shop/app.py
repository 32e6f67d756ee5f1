"""A small shop: orders reserve stock, reservations are confirmed.

    an order is placed (any code with a session)  -> outbox -> relay -> topic shop.orders.v1
    -> handler `reserve`: stock, movement         -> outbox -> relay -> topic shop.reservations.v1
    -> handler `confirm`: confirmation

Not every order goes through at once. One whose shelf is being counted is parked with the later orders of its sku and
tried again, in order; the other skus go on. One for a sku that the warehouse does not have is a dead letter until
somebody adds the sku and replays it.

Run it:  eo run examples.shop.app:app    and    eo relay examples.shop.app:app
Look:    eo dead ls                      mend and:  eo dead replay examples.shop.app:app --all --error Reject
"""

from __future__ import annotations

from pydantic import BaseModel
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from eoframework import App, Message, Reject, Retry, RetryLater, Topic, Tx, exponential


class Base(DeclarativeBase):
    pass


class Product(Base):
    """What the shop sells; `ordered` numbers the orders of a sku in the order of their commits."""

    __tablename__ = "shop_product"
    sku: Mapped[str] = mapped_column(primary_key=True)
    ordered: Mapped[int] = mapped_column(default=0)


class Item(Base):
    """What the warehouse has. A new product may be sold before it is here: its orders are poison until it is."""

    __tablename__ = "shop_item"
    sku: Mapped[str] = mapped_column(primary_key=True)
    free: Mapped[int]


class Order(Base):
    __tablename__ = "shop_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]
    qty: Mapped[int]
    number: Mapped[int]


class Movement(Base):
    """One row for each time stock was taken; nothing but exactly-once processing keeps an order from having two."""

    __tablename__ = "shop_movement"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    sku: Mapped[str]
    qty: Mapped[int]
    number: Mapped[int]
    attempt: Mapped[int]


class Confirmation(Base):
    __tablename__ = "shop_confirmation"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    sku: Mapped[str]
    number: Mapped[int]
    attempt: Mapped[int]


class OrderPlaced(BaseModel):
    order_id: int
    sku: str
    qty: int
    number: int


class StockReserved(BaseModel):
    order_id: int
    sku: str
    number: int


orders = Topic("shop.orders.v1", OrderPlaced, key="sku", id="order_id", partitions=4)
reservations = Topic("shop.reservations.v1", StockReserved, key="sku", id="order_id", partitions=4)

app = App("shop")


def place_order(session: Session, sku: str, qty: int) -> Order:
    """What a web handler does: the order and its message are committed together, or neither."""
    product = session.get_one(Product, sku, with_for_update=True)
    product.ordered += 1
    order = Order(sku=sku, qty=qty, number=product.ordered)
    session.add(order)
    session.flush()
    app.publish(session, orders, OrderPlaced(order_id=order.id, sku=sku, qty=qty, number=order.number))
    return order


class ShelfBeingCounted(Exception):
    """Nothing can be taken from it now."""


@app.handler(orders, name="reserve", retry=Retry(attempts=6, backoff=exponential(0.2, factor=2, max=5)))
def reserve(message: Message[OrderPlaced], tx: Tx) -> None:
    order = message.payload
    item = tx.session.get(Item, order.sku, with_for_update=True)
    if item is None:
        raise Reject(f"the warehouse has no {order.sku}")  # no retry would help: a dead letter at once
    if message.attempt <= refusals(order.order_id):
        raise ShelfBeingCounted(order.sku)  # any exception: rolled back, and tried again as `retry` says
    item.free -= order.qty
    tx.session.add(Movement(**order.model_dump(), attempt=message.attempt))
    tx.publish(reservations, StockReserved(order_id=order.order_id, sku=order.sku, number=order.number))


@app.handler(reservations, name="confirm")
def confirm(message: Message[StockReserved], tx: Tx) -> None:
    reserved = message.payload
    if message.attempt <= delays(reserved.order_id):
        raise RetryLater("the books are closed for a moment", after=0.3)  # the handler knows when to come back
    tx.session.add(Confirmation(**reserved.model_dump(), attempt=message.attempt))


def refusals(order_id: int) -> int:
    """How often the shelf of this order is being counted: up to three times for every 40th."""
    return order_id // 40 % 4 if order_id % 40 == 0 else 0


def delays(order_id: int) -> int:
    """How often the books are closed for this order: once for every 70th."""
    return int(order_id % 70 == 0)
