"""What is done to a run's database and network while its processes live and die; each fault heals by itself."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from eoframework import clock
from tests.campaign.history import History
from tests.proxy import Proxy

KINDS = ("terminate", "lock", "cut before COMMIT", "cut after COMMIT")
_TERMINATE = text("""
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name <> 'campaign'
    AND backend_type = 'client backend' ORDER BY random() LIMIT 1
""")
_LOCKS = (
    "LOCK TABLE account IN EXCLUSIVE MODE",
    "LOCK TABLE eo.position IN SHARE MODE",
    "LOCK TABLE eo.outbox_message IN SHARE MODE",
    "SELECT FROM eo.position FOR UPDATE",
    "SELECT FROM eo.relay_shard FOR UPDATE",
)


class Disturbances:
    """Draws one every so often, and does it on a thread of its own."""

    def __init__(self, engine: Engine, proxy: Proxy | None, seed: str, history: History, counts: Counter[str]) -> None:
        self._engine, self._proxy, self._history, self._counts = engine, proxy, history, counts
        self._planned = _plan(seed, cuts=proxy is not None)
        self._next = clock.monotonic() + 1.0
        self._threads: list[threading.Thread] = []

    def look(self) -> None:
        """Begin one if it is time."""
        if clock.monotonic() < self._next:
            return
        pause, kind, lasting, which = next(self._planned)
        self._next = clock.monotonic() + pause
        self._counts[kind] += 1
        thread = threading.Thread(target=self._do, args=(kind, lasting, which))
        self._threads.append(thread)
        thread.start()

    def heal(self) -> None:
        """Wait until none lasts."""
        for thread in self._threads:
            thread.join()

    def _do(self, kind: str, lasting: float, which: str) -> None:
        number = self._history.begin("disturb", kind=kind, lasting=lasting, which=which)
        with suppress(DBAPIError):  # the server is away, or ended this very backend: it was disturbed all the same
            if kind == "lock":
                self._lock(which, lasting)
            elif kind == "terminate":
                with self._engine.begin() as connection:
                    connection.execute(_TERMINATE)
            elif self._proxy is not None:
                self._proxy.arm("before" if "before" in kind else "after")
        self._history.end(number, "ok")

    def _lock(self, which: str, lasting: float) -> None:
        with self._engine.begin() as connection:
            connection.execute(text("SET LOCAL lock_timeout = '3s'"))
            connection.execute(text(which))
            clock.sleep(lasting)


def _plan(seed: str, *, cuts: bool) -> Iterator[tuple[float, str, float, str]]:
    chance = random.Random(seed)
    kinds = KINDS if cuts else KINDS[:2]
    while True:
        yield chance.uniform(0.5, 2.5), chance.choice(kinds), round(chance.uniform(0.1, 2.0), 2), chance.choice(_LOCKS)
