"""The worker and relay processes of the demo, and what is done to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

APP = "examples.shop.app:app"
ROOT = Path(__file__).resolve().parents[2]


def eo(*arguments: str, environment: dict[str, str]) -> None:
    """Run an `eo` command to its end; its own message says what went wrong."""
    subprocess.run(
        [sys.executable, "-m", "eoframework.cli", *arguments],
        check=True,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )


@contextmanager
def eo_started(*arguments: str, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """An `eo` command that runs meanwhile, and is killed if it still does at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "eoframework.cli", *arguments],
            env=environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass
class Role:
    """A process that is started again whenever it ends."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    kills: int = 0
    pauses: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _paused_until: float | None = None
    _logged: int = field(default=0, repr=False)

    def keep_running(self) -> None:
        """Start it if it is not running; wake it up if its pause is over."""
        if self._paused_until is not None and time.monotonic() > self._paused_until:
            self._signal(signal.SIGCONT)
            self._paused_until = None
        if self._process is None or self._process.poll() is not None:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "eoframework.cli", *self.command],
                    env=self.environment,
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )

    def kill(self) -> bool:
        """SIGKILL: no drain, no goodbye. False if there is nothing to kill now."""
        if self._process is None or self._paused_until is not None or self._process.poll() is not None:
            return False
        self._signal(signal.SIGKILL)
        self._process.wait()
        self.kills += 1
        return True

    def pause(self, seconds: float) -> None:
        """SIGSTOP: to everybody else it looks dead, and then it wakes up and believes it still owns its work."""
        if self._process is not None and self._process.poll() is None:
            self._signal(signal.SIGSTOP)
            self._paused_until = time.monotonic() + seconds
            self.pauses += 1

    @property
    def paused(self) -> bool:
        return self._paused_until is not None

    def stop(self) -> int | None:
        """SIGTERM, and SIGKILL if it has not drained after 20 s; returns how it ended."""
        if self._process is None or self._process.poll() is not None:
            return None
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            return self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            os.kill(self._process.pid, number)


def shop_processes(environment: dict[str, str], logs: Path) -> list[Role]:
    """Two workers and two relays."""
    logs.mkdir(parents=True, exist_ok=True)
    commands = {"worker": ["run", APP], "relay": ["relay", APP]}
    return [
        Role(f"{kind} {number}", command, environment, logs / f"{kind}-{number}.log")
        for kind, command in commands.items()
        for number in (1, 2)
    ]
