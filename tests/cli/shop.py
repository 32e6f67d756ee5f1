"""The app that the command line's tests run: an order is booked, and published on."""

from __future__ import annotations

import os
import threading

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Topic, Tx

_SUFFIX = os.environ.get("SHOP_SUFFIX", "x")


HANGING = 999


class Order(BaseModel):
    order_id: int


orders = Topic(f"shop.orders.{_SUFFIX}", Order, key="order_id", id="order_id", partitions=2)
booked = Topic(f"shop.booked.{_SUFFIX}", Order, key="order_id", partitions=1, config={"retention.ms": "3600000"})
ambitious = App("ambitious", topics=[Topic(f"shop.ambitious.{_SUFFIX}", Order, replication_factor=5)])
app = App(f"shop-{_SUFFIX}", topics=[booked])
not_an_app = object()
empty = App("empty")


@app.handler(orders, name="book", retry=None)
def book(order: Order, tx: Tx) -> None:
    if order.order_id < 0:
        raise ValueError("an order below zero")
    if order.order_id == HANGING:
        threading.Event().wait(60)
    tx.session.execute(text("INSERT INTO booking VALUES (:id, :pid)"), {"id": order.order_id, "pid": os.getpid()})
    tx.publish(booked, order)


@app.handler(booked, name="confirm")
def confirm(order: Order, tx: Tx) -> None:
    tx.session.execute(text("INSERT INTO confirmation VALUES (:id)"), {"id": order.order_id})
