"""An app whose handler pays each order at a till of its own process; crash points armed by the environment."""

from __future__ import annotations

import os
from typing import Any, cast

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, External, ExternalCall, Message, NotDone, Retry, Topic, Tx, fixed
from eoframework.external import Unresolved
from tests.crash import arm_from_environment
from tests.failure import till

LEDGER = "CREATE TABLE ledger (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, n int, charge int)"
POLICY = cast(Unresolved, os.environ.get("POLICY", "retry"))
LEASE = float(os.environ.get("LEASE", "1.5"))
# One attempt, where no other number is given: whatever is not the message's fault must not cost it.
ATTEMPTS = int(os.environ.get("ATTEMPTS", "1"))


class Order(BaseModel):
    n: int
    key: str = "k"
    refuse: int = 0
    """So many calls end with NotDone."""
    fail: bool = False
    """The handler fails once, after the call."""


orders = Topic(os.environ.get("PAY_TOPIC", "pay.orders"), Order, key="key", id="n")
app = App(os.environ.get("PAY_APP", "pay"))


def post_charge(message: Message[Order], call: ExternalCall) -> dict[str, Any]:
    if call.attempt <= message.payload.refuse:
        raise NotDone("refused", after=0.3)
    return till.charge(os.environ["TILL"], key=call.key, attempt=call.attempt, fence=call.fence, n=message.payload.n)


charge = External("charge", post_charge, unresolved=POLICY, lease=LEASE)
retry = Retry(attempts=ATTEMPTS, backoff=fixed(0.2)) if ATTEMPTS else None


@app.handler(orders, external=[charge], retry=retry)
def pay(message: Message[Order], tx: Tx) -> None:
    receipt = tx.external("charge")
    values = {"n": message.payload.n, "c": receipt["charge"]}
    tx.session.execute(text("INSERT INTO ledger (n, charge) VALUES (:n, :c)"), values)
    if message.payload.fail and message.attempt == 1:
        raise RuntimeError("after the call")


arm_from_environment()
