"""A process that runs one message with an external call, as a worker does; killed or frozen where CRASH_AT says.

    python -m tests.failure.pay_once OFFSET

Waits out the lease of a process that was killed before it. TILL is the service's address, HONOUR=0 makes that one
ignore idempotency keys, POLICY is the External's.
"""

from __future__ import annotations

import os
import secrets
import sys
from typing import Any, cast

from sqlalchemy import text

from eoframework import App, External, ExternalCall, Message, Tx, clock
from eoframework.db.session import open_database
from eoframework.errors import Reject
from eoframework.external import InFlight, Unresolved
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.crash import arm_from_environment
from tests.failure import till
from tests.failure.calls import Order, Step, order, orders, run_handler

UNRESOLVED = 3
app = App("shop")


def post_charge(message: Message[Order], call: ExternalCall) -> dict[str, Any]:
    honour = os.environ.get("HONOUR", "1") == "1"
    return till.charge(os.environ["TILL"], key=call.key, attempt=call.attempt, fence=call.fence, honour=honour)


charge = External("charge", post_charge, unresolved=cast(Unresolved, os.environ.get("POLICY", "retry")), lease=1.0)


@app.handler(orders, external=[charge])
def pay(order: Order, tx: Tx) -> None:
    receipt = tx.external("charge")
    tx.session.execute(text("INSERT INTO ledger VALUES (:charge)"), {"charge": receipt["charge"]})


def main(offset: int) -> None:
    arm_from_environment()
    database = open_database(Settings.load().require_database_url(), Schema())
    step = Step(database, app.handlers[0], f"{os.getpid()}:{secrets.token_hex(4)}")
    while True:
        try:
            run_handler(database, step, order(offset, offset=offset))
        except InFlight as busy:
            print(busy, flush=True)
            clock.sleep(busy.after or 0.0)
        except Reject as reject:
            print(reject, flush=True)
            sys.exit(UNRESOLVED)
        else:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
