"""The app whose orders died: what its handlers do is what `eo dead try` has to show."""

from __future__ import annotations

import os

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Message, Topic, Tx
from tests.crash import arm_from_environment

TABLES = """
CREATE TABLE account (id int PRIMARY KEY, balance int, note text);
CREATE TABLE basket (id int PRIMARY KEY, account int REFERENCES account);
CREATE TABLE journal (line text);
CREATE TABLE "odd % name" (a text, b int, PRIMARY KEY (b, a));
CREATE TABLE late (id int PRIMARY KEY, account int REFERENCES account DEFERRABLE INITIALLY DEFERRED);
INSERT INTO account VALUES (1, 100, 'first'), (2, 200, 'second'), (3, 300, NULL);
INSERT INTO basket VALUES (10, 1), (11, 1), (12, 2);
INSERT INTO journal VALUES ('before');
INSERT INTO "odd % name" VALUES ('x', 1), ('y', 2)
"""


class Order(BaseModel):
    order_id: int
    do: str = ""


orders = Topic(os.environ.get("DEAD_TOPIC", "dead.orders"), Order, key="order_id")
bills = Topic("dead.bills", Order, key="order_id")
app = App(os.environ.get("DEAD_APP", "deadshop"))
other_app = App("othershop")


def execute(tx: Tx, statement: str) -> None:
    tx.session.execute(text(statement))


@app.handler(orders, name="book")
def book(order: Order, tx: Tx) -> None:
    """Does what the order says."""
    if order.do == "fail":
        execute(tx, "INSERT INTO account VALUES (99, 0, 'never')")
        raise ValueError("no such article")
    for statement in order.do.split(";"):
        if statement:
            execute(tx, statement)
    tx.publish(bills, Order(order_id=order.order_id))


@app.handler(orders, name="stubborn", retry=None)
def stubborn(order: Order, tx: Tx) -> None:
    """Sends COMMIT by ways that no guard of the client sees."""
    driver = tx.session.connection().connection.dbapi_connection
    assert driver is not None
    execute(tx, "INSERT INTO account VALUES (50, 1, 'sneaked in')")
    if order.do == "swallow":
        try:
            driver.commit()
        except Exception:  # noqa: BLE001 - what the worst of handlers would do
            return
    elif order.do == "text":
        driver.cursor().execute("COMMIT")
    elif order.do == "prepare":
        driver.cursor().execute("PREPARE TRANSACTION 'sneaky'")
    else:
        tx.session.commit()


@app.batch_handler(orders, name="many")
def many(batch: list[Message[Order]], tx: Tx) -> None:
    """One INSERT for all of them."""
    for index, message in enumerate(batch):
        if message.payload.do == "fail":
            tx.fail(index, ValueError("named by the handler"))
        tx.session.execute(text("INSERT INTO journal VALUES (:line)"), {"line": str(message.payload.order_id)})
        tx.publish(bills, message.payload, cause=message)


arm_from_environment()
