"""The app of the rolling upgrade: runs on the code of every version, and says which one it was.

`python rolling_shop.py FIRST` publishes orders from that number on, until the file `stop` exists; prints how many.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from eoframework import App, Topic, Tx

OPTIONS: dict[str, Any] = {}
CODE = os.environ["CODE"]
if CODE != "eo0001":
    from eoframework import Retry, fixed

    OPTIONS = {"retry": Retry(attempts=1000, backoff=fixed(0.5))}

_SUFFIX = os.environ["SHOP_SUFFIX"]


class Order(BaseModel):
    order_id: int
    sku: str


orders = Topic(f"rolling.orders.{_SUFFIX}", Order, key="sku", id="order_id", partitions=4)
booked = Topic(f"rolling.booked.{_SUFFIX}", Order, key="sku", partitions=2)
app = App(f"rolling-{_SUFFIX}", topics=[booked])


@app.handler(orders, name="book", **OPTIONS)
def book(order: Order, tx: Tx) -> None:
    if OPTIONS and order.sku == "k7" and not Path("mended").exists():
        raise ValueError("not yet")
    tx.session.execute(text("INSERT INTO public.booking VALUES (:id, :code)"), {"id": order.order_id, "code": CODE})
    tx.publish(booked, order)


def publish(first: int) -> int:
    engine = create_engine(app.settings.require_database_url())
    number = first
    while not Path(f"stop-{CODE}").exists():
        with Session(engine) as session, session.begin():
            for _ in range(5):
                app.publish(session, orders, Order(order_id=number, sku=f"k{number % 20}"))
                number += 1
        time.sleep(0.02)
    return number - first


if __name__ == "__main__":
    print(publish(int(sys.argv[1])))
