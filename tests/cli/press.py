"""An app with a handler and a transform on one topic, and the same app after its declarations were changed."""

from __future__ import annotations

import os

from pydantic import BaseModel

from eoframework import App, Topic, Tx

_SUFFIX = os.environ.get("SHOP_SUFFIX", "x")


class Order(BaseModel):
    order_id: int


orders = Topic(f"shop.orders.{_SUFFIX}", Order, key="order_id", partitions=2)
pressed = Topic(f"shop.pressed.{_SUFFIX}", Order, key="order_id", partitions=1)
app = App(f"press-{_SUFFIX}")
renamed = App(f"press-{_SUFFIX}")
turned = App(f"press-{_SUFFIX}")


@app.handler(orders, name="book")
def book(order: Order, tx: Tx) -> None:
    tx.session.connection().exec_driver_sql(f"INSERT INTO booking VALUES ({order.order_id}, 0)")


@app.transform(orders, to=pressed, name="press")
@renamed.transform(orders, to=pressed, name="squeeze")
def press(order: Order) -> Order:
    return order


@turned.handler(orders, name="press")
def press_by_hand(order: Order, tx: Tx) -> None:
    book(order, tx)
