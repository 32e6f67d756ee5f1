"""A small shop: orders reserve stock, reservations are confirmed.

    an order is placed (any code with a session)  -> outbox -> relay -> topic shop.orders.v1
    -> handler `reserve`: stock, movement         -> outbox -> relay -> topic shop.reservations.v1
    -> handler `confirm`: confirmation

Run it:  eo run examples.shop.app:app    and    eo relay examples.shop.app:app
"""

from __future__ import annotations

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from eoframework import App, Topic, Tx


class Base(DeclarativeBase):
    pass


class Item(Base):
    """What is in stock; `ordered` numbers the orders of the item in the order of their commits."""

    __tablename__ = "shop_item"
    sku: Mapped[str] = mapped_column(primary_key=True)
    free: Mapped[int]
    ordered: Mapped[int] = mapped_column(default=0)


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


class Confirmation(Base):
    __tablename__ = "shop_confirmation"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    sku: Mapped[str]
    number: Mapped[int]


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
    item = session.scalars(select(Item).where(Item.sku == sku).with_for_update()).one()
    item.ordered += 1
    order = Order(sku=sku, qty=qty, number=item.ordered)
    session.add(order)
    session.flush()
    app.publish(session, orders, OrderPlaced(order_id=order.id, sku=sku, qty=qty, number=order.number))
    return order


@app.handler(orders, name="reserve")
def reserve(order: OrderPlaced, tx: Tx) -> None:
    item = tx.session.get_one(Item, order.sku, with_for_update=True)
    item.free -= order.qty
    tx.session.add(Movement(order_id=order.order_id, sku=order.sku, qty=order.qty, number=order.number))
    tx.publish(reservations, StockReserved(order_id=order.order_id, sku=order.sku, number=order.number))


@app.handler(reservations, name="confirm")
def confirm(reserved: StockReserved, tx: Tx) -> None:
    tx.session.add(Confirmation(order_id=reserved.order_id, sku=reserved.sku, number=reserved.number))
