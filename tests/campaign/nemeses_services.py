"""What is done to the services themselves: for runs that have them alone."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from contextlib import suppress

import psutil
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from eoframework import clock, dev

KINDS = ("broker killed", "broker frozen", "server stopped at once", "server process killed", "server frozen")


class Outages:
    """One after the other, with a pause between."""

    def __init__(self, services: dev.Services, seed: str) -> None:
        self._services = services
        self._chance = random.Random(f"{seed} outages")
        self._next = 2.0

    def __call__(self, seconds: float, counts: Counter[str]) -> None:
        """Do one if it is time, and count it by its kind; it is over when this returns."""
        if seconds < self._next:
            return
        kind, lasting = self._chance.choice(KINDS), self._chance.uniform(0.2, 6.0)
        counts[kind] += 1
        self._do(kind, lasting)
        self._next = seconds + lasting + self._chance.uniform(2.0, 6.0)

    def heal(self, counts: Counter[str]) -> None:
        """Nothing lasts."""

    def _do(self, kind: str, lasting: float) -> None:
        kafka, postgres = self._services.kafka, self._services.postgres
        if kind == "broker killed":
            kafka.kill()
            kafka.start()
        elif kind == "broker frozen":
            kafka.pause()
            clock.sleep(lasting)
            kafka.resume()
        elif kind == "server stopped at once":
            postgres.stop(mode="immediate")
            postgres.start()
        elif kind == "server frozen":
            postgres.pause()
            clock.sleep(lasting)
            postgres.resume()
        else:
            self._kill_a_backend()

    def _kill_a_backend(self) -> None:
        """kill -9 of one of the server's processes: it ends all others and recovers by its log."""
        engine = create_engine(self._services.database_url)
        with suppress(DBAPIError), engine.connect() as connection:  # recovering from the last one
            pids = connection.execute(text("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")).scalars()
            of_the_server = [pid for pid in pids if psutil.pid_exists(pid)]
            os.kill(self._chance.choice(of_the_server), signal.SIGKILL)
        engine.dispose()
