"""The types say what the declarations say: mypy --strict finds a wrong payload before anything runs."""

from __future__ import annotations

from pathlib import Path

from mypy import api

HEAD = """
from __future__ import annotations
from collections.abc import Iterator
from typing import Annotated, Any
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from eoframework import App, Message, Out, Producer, Sent, Topic, Tx

class Order(BaseModel):
    order_id: int
class Refund(BaseModel):
    order_id: int
class Stock(BaseModel):
    order_id: int

orders = Topic("orders", Order, key="order_id", id=lambda order: order.order_id)
maybe = Topic("maybe", Order | None)
either = Topic("either", Annotated[Order | Refund, Field()])
raw = Topic("raw", bytes)
documents = Topic("documents", dict[str, Any])
stocks = Topic("stocks", Stock)
refunds = Topic("refunds", Refund)
tombs = Topic("tombs", Stock | None)
app = App("shop")
"""

RIGHT = """
def without_a_database(producer: Producer) -> None:
    sent: Sent = producer.send(orders, Order(order_id=1), key="a", id="b", headers={"c": "d"}, timeout=1)
    many: list[Sent] = producer.send_many(orders, (Order(order_id=n) for n in range(9)))
    many = producer.send_many([Out(orders, Order(order_id=1)), Out(raw, b"", key=1)], timeout=1)
    sent = producer.send_soon(maybe, None, key=1).result()
    with app.producer.transaction() as t:
        t.send(orders, Order(order_id=1))
    many = t.sent

def web(session: Session) -> None:
    app.publish(session, orders, Order(order_id=1), key="a", delay=3)
    app.publish(session, maybe, None, key="a")
    app.publish(session, maybe, Order(order_id=1))
    app.publish(session, either, Refund(order_id=1))
    app.publish(session, raw, b"")
    app.publish(session, documents, {"a": 1})

@app.handler(orders)
def payload(order: Order) -> None: ...
@app.handler(orders, name="other")
def payload_tx(order: Order, tx: Tx) -> None:
    tx.publish(maybe, None, key=order.order_id)
    tx.publish(orders, order)
@app.handler(orders)
def message(message: Message[Order], tx: Tx) -> None:
    order: Order = message.payload
@app.handler(orders)
def any_message(message: Message, tx: Tx) -> None: ...
@app.handler(maybe)
def tombstones(order: Order | None, tx: Tx) -> None: ...
@app.handler(either)
def one_of(order: Order | Refund, tx: Tx) -> None: ...
@app.batch_handler(orders, max_batch=5)
def batch(batch: list[Order], tx: Tx) -> None: ...
@app.batch_handler(orders)
def messages(batch: list[Message[Order]], tx: Tx) -> None:
    for m in batch:
        tx.publish(orders, m.payload, cause=m)

@app.transform(orders, to=stocks)
def one(order: Order) -> Stock:
    return Stock(order_id=order.order_id)
@app.transform(orders, to=stocks, name="maybe", start="latest", retry=None, breaker=None)
def maybe_one(message: Message[Order]) -> Stock | None: ...
@app.transform(orders, to=stocks)
def many(order: Order) -> list[Stock]:
    return [Stock(order_id=order.order_id)]
@app.transform(orders, to=stocks)
def yields(order: Order) -> Iterator[Stock | Out[Stock]]:
    yield Stock(order_id=order.order_id)
    yield Out(stocks, Stock(order_id=order.order_id), key="a")
@app.transform(orders, to=(stocks, refunds))
def one_of_two(order: Order) -> Stock | Refund | None: ...
@app.transform(orders, to=(stocks, refunds))
def both(order: Order) -> tuple[Stock, Refund]:
    return Stock(order_id=order.order_id), Refund(order_id=order.order_id)
@app.transform(orders, to={stocks, refunds})
def of_a_set(order: Order) -> Stock | Refund | None: ...
@app.transform(orders, to=tombs)
def tombstone(order: Order) -> Out[Stock | None]:
    return Out(tombs, None, key=order.order_id)
@app.transform(maybe, to=stocks)
def of_tombstones(order: Order | None) -> Stock | None: ...
@app.transform(orders, to=stocks, max_batch=5)
def stock_batch(batch: list[Order]) -> list[Stock | None]:
    return [Stock(order_id=order.order_id) for order in batch]
@app.transform(orders, to=stocks)
def stock_messages(batch: list[Message[Order]]) -> list[list[Stock]]:
    return [[Stock(order_id=m.payload.order_id)] for m in batch]

def plain_transforms(order: Order, message: Message[Order]) -> None:
    stock: Stock = one(order)
    perhaps: Stock | None = maybe_one(message)
    either: Stock | Refund | None = one_of_two(order)

def plain_call(tx: Tx) -> None:
    payload_tx(Order(order_id=1), tx)
    payload_tx(Order(order_id=1), tx=tx)
    message(orders.decode(...), tx)  # type: ignore[arg-type]
"""

WRONG = [
    "def f(p: Producer) -> None: p.send(orders, Refund(order_id=1))",
    "def f(p: Producer) -> None: p.send_soon(orders, None)",
    "def f(p: Producer) -> None: p.send_many(orders, [Refund(order_id=1)])",
    "def f(p: Producer) -> None: p.send_many([Order(order_id=1)])",
    "def f(p: Producer) -> None: p.transaction().send(raw, 'x')",
    "def f(p: Producer) -> int: return p.send(raw, b'x')",
    "def f(s: Session) -> None: app.publish(s, orders, Refund(order_id=1))",
    "def f(s: Session) -> None: app.publish(s, orders, {'order_id': 1})",
    "def f(s: Session) -> None: app.publish(s, orders, None)",
    "def f(s: Session) -> None: app.publish(s, maybe, Refund(order_id=1))",
    "def f(s: Session) -> None: app.publish(s, either, 'x')",
    "def f(s: Session) -> None: app.publish(s, raw, 'x')",
    "def f(s: Session) -> None: app.publish('s', raw, b'x')",
    "def f(s: Session) -> None: app.publish(s, raw, b'x', key=1.5)",
    "def f(tx: Tx) -> None: tx.publish(orders, Refund(order_id=1))",
    "@app.handler(orders)\ndef f(order: Refund, tx: Tx) -> None: ...",
    "@app.handler(orders)\ndef f(order: Message[Refund], tx: Tx) -> None: ...",
    "@app.handler(maybe)\ndef f(order: Order, tx: Tx) -> None: ...",
    "@app.handler(orders)\nasync def f(order: Order, tx: Tx) -> None: ...",
    "@app.handler(orders)\ndef f(order: Order, tx: Tx) -> int: return 1",
    "@app.batch_handler(orders)\ndef f(batch: list[Refund], tx: Tx) -> None: ...",
    "@app.batch_handler(orders)\ndef f(order: Order, tx: Tx) -> None: ...",
    "@app.transform(orders, to=stocks)\ndef f(order: Refund) -> Stock: raise KeyError",
    "@app.transform(orders, to=stocks)\ndef f(order: Message[Refund]) -> Stock: raise KeyError",
    "@app.transform(maybe, to=stocks)\ndef f(order: Order) -> Stock: raise KeyError",
    "@app.transform(orders, to=stocks)\ndef f(order: Order) -> Refund: raise KeyError",
    "@app.transform(orders, to=stocks)\ndef f(order: Order) -> Refund | None: raise KeyError",
    "@app.transform(orders, to=stocks)\ndef f(order: Order) -> list[Refund]: raise KeyError",
    "@app.transform(orders, to=stocks)\ndef f(order: Order) -> Iterator[Refund]:\n    yield Refund(order_id=1)",
    "@app.transform(orders, to=stocks)\nasync def f(order: Order) -> Stock: raise KeyError",
    "@app.transform(orders, to=stocks)\ndef f(order: Order, tx: Tx) -> Stock: raise KeyError",
    "@app.transform(orders, to=(stocks, refunds))\ndef f(order: Order) -> Order: raise KeyError",
    "@app.transform(orders, to=stocks)\ndef f(batch: list[Refund]) -> list[Stock]: raise KeyError",
    "@app.transform(orders, to=stocks)\ndef f(batch: list[Order]) -> list[Refund]: raise KeyError",
    "@app.transform(orders, to=stocks)\ndef f(batch: list[Order]) -> Stock: raise KeyError",
    "@app.transform(orders)\ndef f(order: Order) -> Stock: raise KeyError",
    "@app.transform(orders, to='stocks')\ndef f(order: Order) -> Stock: raise KeyError",
    "@app.transform(orders, to=stocks, ordering='key')\ndef f(order: Order) -> Stock: raise KeyError",
    "def f() -> None: Out(stocks, Refund(order_id=1))",
    "def f() -> None: Out(stocks, None)",
    "Topic('t', Order, id=lambda order: order.nope)",
    "def f(tx: Tx) -> None: x: Order = orders.decode(...).key  # noqa",
]


def test_right_programs_pass_and_each_wrong_line_is_an_error(tmp_path: Path) -> None:
    """One run of mypy for all: starting it costs more than checking."""
    right = tmp_path / "right.py"
    right.write_text(HEAD + RIGHT)
    wrong = []
    for n, line in enumerate(WRONG):
        path = tmp_path / f"wrong_{n}.py"
        path.write_text(HEAD + line + "\n")
        wrong.append(path)
    cache = f"--cache-dir={tmp_path / 'cache'}"
    out, err, _ = api.run(["--strict", "--no-error-summary", cache, str(right), *map(str, wrong)])
    assert not err
    assert [line for line in out.splitlines() if "right.py" in line or "eoframework/" in line] == []
    head = HEAD.count("\n")
    for path, line in zip(wrong, WRONG, strict=True):
        errors = [found for found in out.splitlines() if path.name in found and ": error:" in found]
        assert not any("[empty-body]" in found for found in errors), f"another mistake than the one meant: {line}"
        assert errors, f"mypy accepts: {line}"
        assert all(int(found.split(":")[1]) > head for found in errors)
