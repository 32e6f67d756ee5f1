"""An app of transforms alone: each copies the orders, and says in which process."""

from __future__ import annotations

import os

from pydantic import BaseModel

from eoframework import App, Topic
from tests.cli.shop import Order, orders

_SUFFIX = os.environ.get("SHOP_SUFFIX", "x")


class Copy(BaseModel):
    order_id: int
    pid: int


copies = Topic(f"copies.{_SUFFIX}", Copy, key="order_id", partitions=1)
others = Topic(f"others.{_SUFFIX}", Copy, key="order_id", partitions=1)
app = App(f"copiers-{_SUFFIX}")


@app.transform(orders, to=copies)
def copy(order: Order) -> Copy:
    return Copy(order_id=order.order_id, pid=os.getpid())


@app.transform(orders, to={others}, name="copy_all", retry=None)
def copy_all(batch: list[Order]) -> list[Copy]:
    return [Copy(order_id=order.order_id, pid=os.getpid()) for order in batch]
