"""Several worker processes under one parent: started, watched, restarted when that helps, stopped together."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from eoframework import clock
from eoframework.lifecycle import Backoff
from eoframework.settings import environment

_log = logging.getLogger(__name__)

RESTART = 75
_WATCH = 0.1
_QUIET_AFTER = 60.0


class Supervisor:
    """Runs `command --worker-index N` in several processes.

    A process that ends with 75 or by a signal is started again, after a growing wait. Any other failure stops all and
    decides the exit code: a restart would not help. When this process dies, its children notice and drain.
    """

    def __init__(self, command: Sequence[str], *, workers: int, once: bool) -> None:
        self._once = once
        self._children = [_Child(command, index) for index in range(workers)]

    def run(self, stop: threading.Event) -> int:
        """Supervise until `stop`, or until all have finished; then drain all. Returns the exit code."""
        for child in self._children:
            child.start()
        code = 0
        while code == 0 and not stop.is_set() and not all(child.finished for child in self._children):
            code = next((bad for child in self._children if (bad := child.look_after(once=self._once))), 0)
            clock.wait(stop, _WATCH)
        if code:
            _log.error("a worker ended with exit code %d, which a restart would not help; stopping all.", code)
        for child in self._children:
            child.ask_to_drain()
        endings = [child.ended() for child in self._children]
        return code or max(endings)

    def kill(self) -> None:
        """Leave no child behind, now; PostgreSQL and Kafka undo what it had not committed."""
        for child in self._children:
            child.kill()


class _Child:
    """One worker process and the wait before its next start."""

    def __init__(self, command: Sequence[str], index: int) -> None:
        self._command = [*command, "--worker-index", str(index)]
        self._name = f"worker {index}"
        self._backoff = Backoff(first=1.0, longest=30.0)
        self._start_at: float | None = None
        self._started = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self.finished = False

    def start(self) -> None:
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once; otherwise each child would
        # get it twice and take the second for "leave at once". The pipe is never written to: its end tells the child
        # that we are gone, however we went.
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, start_new_session=True, env=environment()
        )
        self._started, self._start_at = clock.monotonic(), None
        _log.info("%s started (pid %d).", self._name, self._process.pid)

    def look_after(self, *, once: bool) -> int:
        """Start again what ended and can be; returns an exit code if that means the end for all."""
        if self.finished or self._process is None:
            return 0
        if self._start_at is not None:
            if clock.monotonic() >= self._start_at:
                self.start()
            return 0
        code = self._process.poll()
        if code is None:
            return 0
        self.finished = once and code == 0
        if code > 0 and code != RESTART:
            return code
        if not self.finished:
            self._plan_restart(code)
        return 0

    def ask_to_drain(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """Wait until the process has ended; returns its exit code. One killed by a signal counts as 75."""
        process = self._process
        if process is None:
            return 0
        code = process.wait()
        if process.stdin:
            process.stdin.close()
        if self._start_at is not None:
            # It had ended before the end was asked for, and waited for its next start.
            return 0
        return code if code >= 0 else RESTART

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _plan_restart(self, code: int) -> None:
        if clock.monotonic() - self._started > _QUIET_AFTER:
            self._backoff.reset()
        wait = self._backoff.next()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        _log.warning("%s %s; starting it again in %.1f s. Nothing is lost.", self._name, how, wait)
        self._start_at = clock.monotonic() + wait


def python_command(*arguments: str) -> list[str]:
    """`eo` with these arguments, under this interpreter."""
    return [sys.executable, "-m", "eoframework.cli", *arguments]
