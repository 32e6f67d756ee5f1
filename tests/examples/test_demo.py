"""The demonstration, small: it must end with zeros, failures included, and leave nothing behind when interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from examples.shop import reconcile
from examples.shop.demo import UNREADABLE
from examples.shop.reconcile import Entry, Letter, compare
from tests.processes import REPOSITORY, eventually

MARK = "EXAMPLE_RUN"


def start_demo(mark: str, *arguments: str) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EO_")}
    return subprocess.Popen(
        [sys.executable, "-m", "examples.shop.demo", *arguments],
        cwd=REPOSITORY,
        env={**environment, MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A run started in the background by a shell ignores SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads before exec
    )


def processes_with(mark: str) -> list[str]:
    """The command lines of all processes that were started, however indirectly, under this mark."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # not a process, or gone meanwhile
    return found


def numbers_of(place: str, output: str) -> list[int]:
    """The table's line of this place."""
    line = next(line for line in output.splitlines() if line.startswith(place))
    return [int(number) for number in line.removeprefix(place).split()]


@pytest.mark.timeout(300)
def test_a_small_demo_ends_with_zeros() -> None:
    mark = uuid.uuid4().hex
    demo = start_demo(mark, "--orders", "600", "--seconds", "14", "--seed", "7")
    written, _ = demo.communicate(timeout=290)
    output = written.decode()
    assert demo.returncode == 0, output
    for said in ("every order counted once", "SIGKILL worker", "SIGKILL eo dead replay", "SIGSTOP", "DecodeError"):
        assert said in output
    orders, *zeros = numbers_of("orders topic", output)
    assert zeros == [0, 0, 0]
    assert numbers_of("reservations topic", output) == [orders, 0, 0, 0]
    found, *zeros, retried, parked, dead, replayed = numbers_of("stock movements", output)
    assert [found, *zeros] == [orders, 0, 0, 0]
    assert parked >= retried > 0
    assert dead - UNREADABLE == replayed > 0
    found, *zeros, retried, parked, dead, replayed = numbers_of("confirmations", output)
    assert [found, *zeros] == [orders, 0, 0, 0]
    assert parked >= retried > 0
    assert (dead, replayed) == (0, 0)
    eventually(lambda: not processes_with(mark), "every process of the demo is gone", seconds=60)


@pytest.mark.parametrize("when", ["while the services start", "while everything runs"])
def test_ctrl_c_leaves_no_process_behind(when: str) -> None:
    mark = uuid.uuid4().hex
    demo = start_demo(mark, "--orders", "600", "--seconds", "30")
    if when == "while everything runs":
        eventually(lambda: len(processes_with(mark)) > 6, "workers, relays and services run", seconds=60)
    else:
        eventually(lambda: len(processes_with(mark)) > 1, "something was started", seconds=60)
    os.killpg(demo.pid, signal.SIGINT)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, output.decode()
    eventually(lambda: not processes_with(mark), "every process of the demo is gone", seconds=60)


def test_the_reconciliation_sees_what_is_wrong() -> None:
    """The table would be worthless if it could not show a loss, a double and a wrong order."""
    sent = [Entry(1, "a", 1), Entry(2, "a", 2), Entry(3, "b", 1)]
    assert compare("right", sent, sent).clean
    assert compare("lost", sent, sent[:2]).lost == 1
    assert compare("doubled", sent, [*sent, sent[0]]).doubled == 1
    assert compare("never sent", sent, [*sent, Entry(9, "c", 1)]).doubled == 1
    assert compare("reordered", sent, [sent[1], sent[0], sent[2]]).reordered == 1


POISON = Letter(1, "shop.reserve", (0, 5), 7, "Reject")
UNREAD = Letter(2, "shop.reserve", (1, 3), None, "DecodeError")


def test_the_account_sees_what_is_wrong_with_dead_letters() -> None:
    """The demo's verdict would be worthless if it could not see one too many, one too few, or the wrong one."""
    about = reconcile.wrong_about_dead
    assert not about([7], [(1, 3)], [POISON, UNREAD])
    assert about([7, 8], [(1, 3)], [POISON, UNREAD]) == ["dead letters of orders: too many [], missing [8]"]
    assert about([], [(1, 3)], [POISON, UNREAD]) == ["dead letters of orders: too many [7], missing []"]
    assert about([7], [(1, 3)], [POISON, POISON, UNREAD])
    assert about([7], [], [POISON, UNREAD])
    assert about([7], [(1, 3), (1, 4)], [POISON, UNREAD])


def test_the_account_sees_what_is_wrong_with_replays() -> None:
    about = reconcile.wrong_about_replayed
    assert not about([POISON, UNREAD], [1], [UNREAD])
    assert about([POISON, UNREAD], [1, 1], [UNREAD]) == ["replays: too many [1], missing []"]
    assert about([POISON, UNREAD], [], [UNREAD]) == ["replays: too many [], missing [1]"]
    assert about([POISON, UNREAD], [1, 2], [])
    assert about([POISON, UNREAD], [1], [POISON, UNREAD]) == ["dead letters left: too many [1], missing []"]


def test_the_account_sees_effects_of_the_dead_and_attempts_that_are_wrong() -> None:
    assert not reconcile.wrong_about_effects([Entry(1, "a", 1)], [7])
    assert reconcile.wrong_about_effects([Entry(1, "a", 1), Entry(7, "new", 1)], [7])
    right = [Entry(1, "a", 1, attempt=3), Entry(2, "a", 2, attempt=1)]
    failures = {1: 2, 2: 0}.__getitem__
    assert not reconcile.wrong_about_attempts("there", right, failures)
    assert reconcile.wrong_about_attempts("there", [Entry(1, "a", 1, attempt=2)], failures)
    assert reconcile.wrong_about_attempts("there", [Entry(2, "a", 2, attempt=2)], failures)
