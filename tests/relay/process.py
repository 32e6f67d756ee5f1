"""A relay process that kills or holds itself at a named event: all of it stands here, none of it in the product.

--die-at EVENT[:n]   SIGKILL itself at the n-th time (default the first); EVENT+ kills from a thread a moment later, so
                     that the call after the event is under way
--hold EVENT         at the first time, write the event to the --told file and stop itself (SIGSTOP) until SIGCONT
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from eoframework import clock, events, lifecycle
from eoframework.db.schema import Schema
from eoframework.db.session import open_database
from eoframework.relay import RelayWorker
from eoframework.settings import Settings


class Conduct:
    """Listens to events and does what the arguments say."""

    def __init__(self, die_at: str, hold: str, told: Path) -> None:
        name, _, nth = die_at.partition(":")
        self._soon = name.endswith("+")
        self._die_at, self._nth = name.rstrip("+"), int(nth or 1)
        self._hold, self._told = hold, told
        self._seen = 0
        self._lock = threading.Lock()

    def __call__(self, name: str, fields: dict[str, object]) -> None:
        if name == self._die_at:
            with self._lock:
                self._seen += 1
                now = self._seen == self._nth
            if now and self._soon:
                threading.Thread(target=self._die_soon, daemon=True).start()
            elif now:
                os.kill(os.getpid(), signal.SIGKILL)
        with self._lock:
            holding, self._hold = (name == self._hold), ("" if name == self._hold else self._hold)
        if holding:
            self._told.write_text(name)
            os.kill(os.getpid(), signal.SIGSTOP)

    def _die_soon(self) -> None:
        clock.sleep(clock.jitter(0.0, 0.002))
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--die-at", default="")
    parser.add_argument("--hold", default="")
    parser.add_argument("--told", type=Path, required=True)
    parser.add_argument("--once", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(threadName)s %(levelname)s %(message)s")
    events.subscribe(Conduct(arguments.die_at, arguments.hold, arguments.told))
    settings = Settings.load()
    database = open_database(settings.require_database_url(), Schema(settings.database_schema))
    stop = threading.Event()
    with lifecycle.signals(stop):
        return lifecycle.run([RelayWorker(database, settings)], stop=stop, once=arguments.once)


if __name__ == "__main__":
    sys.exit(main())
