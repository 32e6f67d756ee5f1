"""The one life every long-lived thing leads: start, step until told to stop, close."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

from eoframework import clock
from eoframework.errors import Abortable, EoError, Fenced, Retryable

_log = logging.getLogger(__name__)

_RESTART = 75
_BACKOFF_FIRST = 0.1
_BACKOFF_MAX = 5.0
_WATCH = 0.2
_USUAL_THRESHOLDS = {700, 2000}  # Python 3.11, 3.13
_ROOMY_THRESHOLD = 20_000


class Worker(Protocol):
    """Something that runs on a thread of its own; all four methods are called on that thread."""

    name: str

    def start(self) -> None:
        """Open clients, claim. May raise EoError; after a Retryable one it is called again."""

    def step(self) -> float:
        """One unit of work; returns the seconds until the next (0 = at once).

        After a Retryable error it is called again, a little later: the error promises that nothing happened.
        """

    def drained(self) -> bool:
        """Whether everything that was there is done (asked after a step, with `once`)."""

    def close(self) -> None:
        """Finish what is in flight, release, close clients; called whenever `start` was, even if that failed."""


def run(workers: Sequence[Worker], *, stop: threading.Event, once: bool = False) -> int:
    """Run every worker until `stop` is set (or, with `once`, until all are drained); returns the exit code.

    The first error that is not Retryable stops all: the others finish what is in flight and close. That error is
    logged and decides the exit code.
    """
    lives = [_Life(worker, stop, once=once) for worker in workers]
    for life in lives:
        life.thread.start()
    told = False
    while any(life.thread.is_alive() for life in lives):
        if stop.is_set() and not told:
            told = True
            _log.info("stopping: what is in flight is finished first.")
        # Joining with a timeout leaves this, the main thread, free to run signal handlers in between.
        for life in lives:
            life.thread.join(_WATCH)
    failures = sorted((life for life in lives if life.error is not None), key=lambda life: life.failed_at)
    return exit_code(failures[0].error) if failures else 0


def exit_code(error: BaseException | None) -> int:
    """What the process ends with (DESIGN.md, "Exit codes")."""
    if error is None:
        return 0
    if isinstance(error, (Fenced, Abortable, Retryable)):
        # It left the worker that should have dealt with it; nothing half-done remains, a new process starts afresh.
        return _RESTART
    return error.exit_code if isinstance(error, EoError) else 1


@contextmanager
def signals(stop: threading.Event, *, at_once: Callable[[], None] | None = None) -> Iterator[None]:
    """First SIGTERM or SIGINT: set `stop`, so that workers drain. Second: leave at once with 143 or 130.

    On the second signal nothing is closed, only `at_once` called: PostgreSQL and Kafka undo what was not committed.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Only a flag, never an exception: raised out of a poll it would lose the records just fetched.
        if stop.is_set():
            os.write(2, b"second signal: leaving at once; what was not committed is undone and runs again\n")
            if at_once is not None:
                at_once()
            os._exit(128 + number)
        stop.set()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            # Once drained, the process ends by itself: a late second Ctrl-C must not turn exit code 0 into a traceback.
            signal.signal(number, signal.SIG_IGN if stop.is_set() else handler)


def stop_when_orphaned(stop: threading.Event, *, pipe: int = 0) -> None:
    """Set `stop` when the other end of `pipe` is closed: the parent has died, even by SIGKILL."""

    def watch() -> None:
        # os.read and not sys.stdin: a thread inside a buffered read would abort the interpreter's shutdown.
        while os.read(pipe, 1):
            continue
        if not stop.is_set():
            _log.warning("the parent process is gone; draining.")
        stop.set()

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def spare_the_collector() -> None:
    """Keep Python's garbage collector from looking at the whole heap all the time; once everything is imported.

    A batch is tens of thousands of objects that die by themselves. Seen: every batch of 5,000 messages was followed by
    a full run through the 100,000 objects of modules and models, 40 ms long, a quarter of a transform's time.
    Only for a process of our own. A threshold that the app has set stays.
    """
    gc.collect()
    gc.freeze()
    if gc.get_threshold()[0] in _USUAL_THRESHOLDS:
        gc.set_threshold(_ROOMY_THRESHOLD)


class Backoff:
    """Growing waits between attempts, with jitter so that contenders do not meet again at the same instant."""

    def __init__(self, *, first: float = _BACKOFF_FIRST, longest: float = _BACKOFF_MAX) -> None:
        self._first = first
        self._longest = longest
        self._next = first

    def next(self) -> float:
        """The seconds to wait before the next attempt."""
        wait = self._next * clock.jitter(0.8, 1.2)
        self._next = min(self._next * 2, self._longest)
        return wait

    def reset(self) -> None:
        """An attempt succeeded: begin small again."""
        self._next = self._first


class _Life:
    """One worker, its thread, and how it ended."""

    def __init__(self, worker: Worker, stop: threading.Event, *, once: bool) -> None:
        self.worker = worker
        self.error: BaseException | None = None
        self.failed_at = 0.0
        self._stop = stop
        self._once = once
        self._begun = False
        # A daemon: after the second signal, or when the main thread fails, no thread may keep the process alive.
        self.thread = threading.Thread(target=self._live, name=worker.name, daemon=True)

    def _live(self) -> None:
        try:
            self._start()
            self._steps()
        except BaseException as error:  # noqa: BLE001 - recorded, logged, and it decides the exit code
            self._fail(error, "Stopping all workers")
        if not self._begun:
            return
        try:
            self.worker.close()
        except BaseException as error:  # noqa: BLE001 - as above
            self._fail(error, "This was while closing")

    def _start(self) -> None:
        backoff = Backoff()
        while not self._stop.is_set():
            self._begun = True
            try:
                self.worker.start()
            except Retryable as error:
                self._wait_after(error, backoff)
            else:
                return

    def _steps(self) -> None:
        backoff = Backoff()
        while not self._stop.is_set():
            try:
                delay = self.worker.step()
            except Retryable as error:
                self._wait_after(error, backoff)
                continue
            backoff.reset()
            if self._once and self.worker.drained():
                return
            if delay > 0:
                clock.wait(self._stop, delay)

    def _wait_after(self, error: Retryable, backoff: Backoff) -> None:
        wait = backoff.next()
        _log.warning("%s: %s Trying again in %.1f s; nothing is lost.", self.worker.name, error, wait)
        clock.wait(self._stop, wait)

    def _fail(self, error: BaseException, what: str) -> None:
        if self.error is None:
            self.error, self.failed_at = error, clock.monotonic()
        self._stop.set()
        if isinstance(error, EoError):
            _log.error("%s: %s — %s; nothing is skipped.", self.worker.name, error, what)
        else:
            text = "%s: unexpected error. %s; what was not committed runs again."
            _log.error(text, self.worker.name, what, exc_info=error)
