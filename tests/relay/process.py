"""A relay process that kills or holds itself at a named event: all of it stands here, none of it in the product.

--die-at EVENT[:n]   SIGKILL itself at the n-th time (default the first); EVENT+ kills from a thread a moment later, so
                     that the call after the event is under way
--hold EVENT[:n]     at the n-th time, write the event to the --told file and stop itself (SIGSTOP) until SIGCONT;
                     EVENT may be sql:TEXT, then it is before the first statement that begins with TEXT
--keep-after-abort   go on with the producer whose transaction was aborted (the protection against a late abort, off)
--patience SHARE     of retry.backoff.ms before a commit is doubted: 0 doubts all, inf none
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path

from sqlalchemy import Engine, event

from eoframework import clock, events, lifecycle
from eoframework.db.session import open_database
from eoframework.kafka import transaction
from eoframework.relay import RelayWorker
from eoframework.schema import Schema
from eoframework.settings import Settings


class Conduct:
    """Listens to events and does what the arguments say."""

    def __init__(self, die_at: str, hold: str, told: Path) -> None:
        name, _, nth = die_at.partition(":")
        self._soon = name.endswith("+")
        self._die_at, self._nth = name.rstrip("+"), int(nth or 1)
        self._hold, _, hold_nth = hold.rpartition(":") if hold[-1:].isdigit() else (hold, "", "1")
        self._hold_nth, self._told = int(hold_nth), told
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, name: str, fields: dict[str, object]) -> None:
        with self._lock:
            self._seen[name] += 1
            seen = self._seen[name]
        if name == self._die_at and seen == self._nth:
            if self._soon:
                threading.Thread(target=self._die_soon, daemon=True).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        if name == self._hold and seen == self._hold_nth:
            self._told.write_text(name)
            os.kill(os.getpid(), signal.SIGSTOP)

    def on_statement(self, connection: object, cursor: object, statement: str, *_: object) -> None:
        text = self._hold.removeprefix("sql:")
        if text != self._hold and statement.lstrip().startswith(text):
            self(self._hold, {})

    def _die_soon(self) -> None:
        clock.sleep(clock.jitter(0.0, 0.002))
        os.kill(os.getpid(), signal.SIGKILL)


def abort_and_keep(producer: transaction.TransactionalProducer) -> None:
    # Nothing may be in flight: librdkafka would otherwise raise the epoch by itself, which is a protection too.
    client = producer._ready().client
    client.flush(30)
    client.abort_transaction(10)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--die-at", default="")
    parser.add_argument("--hold", default="")
    parser.add_argument("--told", type=Path, required=True)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--keep-after-abort", action="store_true")
    parser.add_argument("--patience", type=float)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)s %(levelname)s %(message)s")
    conduct = Conduct(arguments.die_at, arguments.hold, arguments.told)
    events.subscribe(conduct)
    event.listen(Engine, "before_cursor_execute", conduct.on_statement)
    if arguments.patience is not None:
        transaction._QUARANTINE_SHARE = arguments.patience
    if arguments.keep_after_abort:
        transaction.TransactionalProducer.abort = abort_and_keep  # type: ignore[method-assign]
    settings = Settings.load()
    database = open_database(settings.require_database_url(), Schema(settings.database_schema))
    stop = threading.Event()
    with lifecycle.signals(stop):
        return lifecycle.run([RelayWorker(database, settings)], stop=stop, once=arguments.once)


if __name__ == "__main__":
    sys.exit(main())
