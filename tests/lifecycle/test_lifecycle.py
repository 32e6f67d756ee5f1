"""Start, step, close: who calls what, and what an error of each class does."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from eoframework import lifecycle
from eoframework.errors import (
    Abortable,
    ConfigurationError,
    FailClosed,
    Fenced,
    LostConnection,
    RestartNeeded,
    Retryable,
    Unreachable,
)


class Recorder:
    """A worker whose steps are given, and which remembers what was asked of it."""

    def __init__(self, name: str = "recorder", *, steps: list[float | Exception] | None = None, endless: bool = False):
        self.name = name
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.on_start: Callable[[], None] = lambda: None
        self.on_close: Callable[[], None] = lambda: None
        self._steps = steps or []
        self._endless = endless

    def start(self) -> None:
        self._note("start")
        self.on_start()

    def step(self) -> float:
        self._note("step")
        outcome = self._steps.pop(0) if self._steps else 0.01
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def drained(self) -> bool:
        return not self._steps and not self._endless

    def close(self) -> None:
        self._note("close")
        self.on_close()

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self.threads.add(threading.get_ident())


def run(*workers: Recorder, once: bool = True, stop: threading.Event | None = None) -> int:
    return lifecycle.run(workers, stop=stop or threading.Event(), once=once)


def test_once_steps_until_drained_and_closes_on_the_same_thread() -> None:
    worker = Recorder(steps=[0, 0, 0])
    assert run(worker) == 0
    assert worker.calls == ["start", "step", "step", "step", "close"]
    assert len(worker.threads) == 1
    assert threading.get_ident() not in worker.threads


@pytest.mark.parametrize("error", [Retryable("busy."), LostConnection("gone.")])
def test_a_retryable_error_is_told_and_the_step_runs_again(error: Retryable, caplog: pytest.LogCaptureFixture) -> None:
    worker = Recorder(steps=[error, 0])
    assert run(worker) == 0
    assert worker.calls == ["start", "step", "step", "close"]
    assert "nothing is lost" in caplog.text


def test_a_retryable_error_of_start_is_tried_again() -> None:
    worker, attempts = Recorder(), [Retryable("not yet."), None]

    def start() -> None:
        error = attempts.pop(0)
        if error is not None:
            raise error

    worker.on_start = start
    assert run(worker) == 0
    assert worker.calls == ["start", "start", "step", "close"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("wrong."), 3),
        (Unreachable("down."), 69),
        (FailClosed("guess."), 70),
        (RestartNeeded("fatal."), 75),
        (Fenced("late."), 75),
        (Abortable("half."), 75),
        (ValueError("bug"), 1),
    ],
)
def test_the_first_other_error_stops_all_and_decides_the_exit_code(
    error: Exception, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    failing, other = Recorder("failing", steps=[0, error]), Recorder("other", endless=True)
    running = threading.Event()
    other.on_start, failing.on_start = running.set, lambda: None if running.wait(10) else pytest.fail("not started")
    assert run(failing, other, once=False) == code
    assert failing.calls == ["start", "step", "step", "close"]
    assert (other.calls[0], other.calls[-1]) == ("start", "close")
    assert str(error) in caplog.text


def test_an_error_of_start_still_closes() -> None:
    worker = Recorder()

    def refuse() -> None:
        raise ConfigurationError("no topic.")

    worker.on_start = refuse
    assert run(worker) == 3
    assert worker.calls == ["start", "close"]


def test_what_was_never_started_is_not_closed() -> None:
    stop = threading.Event()
    stop.set()
    worker = Recorder()
    assert run(worker, stop=stop) == 0
    assert worker.calls == []


def test_an_error_of_close_is_not_swallowed(caplog: pytest.LogCaptureFixture) -> None:
    worker = Recorder()

    def refuse() -> None:
        raise RuntimeError("cannot close")

    worker.on_close = refuse
    assert run(worker) == 1
    assert "cannot close" in caplog.text


def test_an_error_that_is_no_exception_stops_all() -> None:
    """Some calls of the Kafka client raise what is no `Exception`; that may not end a thread in silence."""

    class NoException(BaseException):
        pass

    worker = Recorder()

    def fail() -> None:
        raise NoException

    worker.on_start = fail
    assert run(worker, once=False) == 1


def test_stop_wakes_a_sleeping_worker() -> None:
    stop = threading.Event()
    worker = Recorder(steps=[3600], endless=True)
    threading.Timer(0.2, stop.set).start()
    assert run(worker, once=False, stop=stop) == 0
    assert worker.calls == ["start", "step", "close"]


def test_stop_ends_the_waits_between_attempts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    stop = threading.Event()
    worker = Recorder(steps=[Retryable("busy.") for _ in range(1000)])
    threading.Timer(0.3, stop.set).start()
    assert run(worker, once=False, stop=stop) == 0
    assert worker.calls[-1] == "close"
    assert len(worker.calls) < 20


def test_waits_grow_and_begin_small_again() -> None:
    backoff = lifecycle.Backoff(first=1, longest=8)
    waits = [backoff.next() for _ in range(8)]
    assert waits[-1] > 4 * waits[0]
    assert max(waits) <= 8 * 1.2
    backoff.reset()
    assert backoff.next() <= 1.2


@pytest.mark.parametrize(("chosen", "left"), [(None, 20_000), (5_000, 5_000), (0, 0)])
def test_the_collector_is_spared_what_was_imported(chosen: int | None, left: int) -> None:
    """Fails without gc.freeze(), and without the look at the threshold that an app has set."""
    program = (
        "import gc; from eoframework import lifecycle\n"
        + ("" if chosen is None else f"gc.set_threshold({chosen})\n")
        + "lifecycle.spare_the_collector(); print(gc.get_freeze_count() > 1_000, gc.get_threshold()[0])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", str(left)]
