"""The app whose database is restored: a handler that publishes, one that reads that, and a transform."""

from __future__ import annotations

import os

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Reject, Topic, Tx

_SUFFIX = os.environ.get("SHOP_SUFFIX", "x")

TABLES = """
CREATE TABLE booking (id int);
CREATE TABLE collected (id int);
CREATE TABLE refused (id int)
"""


class Order(BaseModel):
    order_id: int


orders = Topic(f"restored.orders.{_SUFFIX}", Order, key="order_id", id="order_id", partitions=2)
bills = Topic(f"restored.bills.{_SUFFIX}", Order, key="order_id", partitions=1)
labels = Topic(f"restored.labels.{_SUFFIX}", Order, key="order_id", partitions=1)
app = App(f"restored-{_SUFFIX}")


@app.handler(orders, name="book")
def book(order: Order, tx: Tx) -> None:
    if tx.session.execute(text("SELECT 1 FROM refused WHERE id = :id"), {"id": order.order_id}).first():
        raise Reject("on the list")
    tx.session.execute(text("INSERT INTO booking VALUES (:id)"), {"id": order.order_id})
    tx.publish(bills, order)


@app.handler(bills, name="collect")
def collect(order: Order, tx: Tx) -> None:
    tx.session.execute(text("INSERT INTO collected VALUES (:id)"), {"id": order.order_id})


@app.transform(orders, to=labels, name="label")
def label(order: Order) -> Order:
    return order
