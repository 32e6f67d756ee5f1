"""The app that the roles run: an order is booked and published on; one below zero is rejected; each is copied."""

from __future__ import annotations

import os

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Reject, Topic, Tx

_SUFFIX = os.environ.get("SHOP_SUFFIX", "x")


class Order(BaseModel):
    order_id: int


orders = Topic(f"roles.orders.{_SUFFIX}", Order, key="order_id", id="order_id", partitions=1)
booked = Topic(f"roles.booked.{_SUFFIX}", Order, key="order_id", partitions=1)
copies = Topic(f"roles.copies.{_SUFFIX}", Order, key="order_id", partitions=1)
app = App(f"roles-{_SUFFIX}", topics=[booked])


@app.handler(orders, name="book", dead_letter_topic=True)
def book(order: Order, tx: Tx) -> None:
    if order.order_id < 0:
        raise Reject("below zero")
    tx.session.execute(text("INSERT INTO booking VALUES (:id, :pid)"), {"id": order.order_id, "pid": os.getpid()})
    tx.publish(booked, order)


@app.transform(orders, to=copies, name="copy")
def copy(order: Order) -> Order:
    if order.order_id < 0:
        raise Reject("below zero")
    return order
