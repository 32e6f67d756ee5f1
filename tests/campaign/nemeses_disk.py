"""The server's disk is full: its data lie on a file system of their own, which is filled under load and freed again."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from eoframework import clock, dev
from eoframework.dev.state import StateDirectory

SETTINGS = {"min_wal_size": "32MB", "max_wal_size": "64MB"}
"""So that there are few segments at hand: the log needs new ones soon."""
_MEGABYTES = 320
_BACK_WITHIN = 60.0


class CannotMount(Exception):
    """Whoever runs this has no right to mount a file system."""


@contextmanager
def small_disk(state: Path) -> Iterator[Path]:
    """A file system for the server of this state directory, which has not been started yet; raises CannotMount."""
    where = Path(tempfile.mkdtemp(prefix="eo-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", f"size={_MEGABYTES}m,mode=711", "tmpfs", str(where)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CannotMount(f"`{' '.join(command)}` needs root's rights here: {done.stderr.strip()}")
        try:
            _put_the_server(state, where / "postgres")
            yield where
        finally:
            subprocess.run(["umount", "--lazy", str(where)], check=True)
    finally:
        shutil.rmtree(where, ignore_errors=True)


def _put_the_server(state: Path, home: Path) -> None:
    directory = StateDirectory(state)
    directory.prepare()
    with directory.locked():
        remembered = directory.load()
        remembered.postgres.home = str(home)
        directory.save(remembered)


class FullDisk:
    """Full for a few seconds, again and again; what the server made of it is counted."""

    def __init__(self, services: dev.Services, disk: Path, seed: str) -> None:
        self._postgres, self._url, self._filler = services.postgres, services.database_url, disk / "filler"
        self._chance = random.Random(f"{seed} disk")
        self._next = 3.0
        self._until = 0.0
        self._seen: tuple[int, int] = (0, 0)

    def __call__(self, seconds: float, counts: Counter[str]) -> None:
        """Fill it, use the log up, or free it, whichever is due."""
        if self._until and seconds < self._until:
            self._use_up_the_log()
        elif self._until:
            self._free(counts)
            self._next = seconds + self._chance.uniform(4.0, 9.0)
        elif seconds > self._next:
            self._seen = self._said()
            self._fill(self._chance.choice((0, 0, 8192, 4 * 2**20)))
            counts["disk full"] += 1
            self._until = seconds + self._chance.uniform(1.0, 8.0)

    def heal(self, counts: Counter[str]) -> None:
        """Free it, if it is full, and have the server back."""
        if self._until:
            self._free(counts)

    def _fill(self, leave: int) -> None:
        there = os.statvfs(self._filler.parent)
        with self._filler.open("wb") as file, suppress(OSError):  # the server may take some of it meanwhile
            os.posix_fallocate(file.fileno(), 0, max(there.f_bavail * there.f_frsize - leave, 1))

    def _use_up_the_log(self) -> None:
        engine = create_engine(self._url, connect_args={"connect_timeout": 2})
        with suppress(DBAPIError), engine.begin() as connection:  # that is what it is for
            connection.execute(text("SELECT pg_switch_wal()"))
        engine.dispose()

    def _free(self, counts: Counter[str]) -> None:
        self._filler.unlink()
        panics, refusals = (now - before for now, before in zip(self._said(), self._seen, strict=True))
        if panics:
            counts["disk full: the server panicked"] += 1
        elif refusals:
            counts["disk full: statements refused"] += 1
        if not self._postgres.running():
            counts["disk full: the server was started again"] += 1
            self._postgres.stop(mode="immediate")
            self._postgres.start()
        self._wait_until_it_answers()
        self._until = 0.0

    def _said(self) -> tuple[int, int]:
        said = self._postgres.log.read_text(errors="replace")
        return said.count("PANIC:"), said.count("No space left on device")

    def _wait_until_it_answers(self) -> None:
        deadline = clock.monotonic() + _BACK_WITHIN
        engine = create_engine(self._url, connect_args={"connect_timeout": 2})
        while True:
            try:
                with engine.connect() as connection:
                    connection.execute(text("SELECT 1"))
            except DBAPIError:
                # Recovering; or it has given up, as its disk was full then too.
                assert clock.monotonic() < deadline, "the server does not come back"
                if not self._postgres.running():
                    self._postgres.stop(mode="immediate")
                    self._postgres.start()
                clock.sleep(0.1)
            else:
                engine.dispose()
                return
