"""The demonstration, small: it must end with zeros, and leave nothing behind when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from examples.shop.reconcile import Entry, compare
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


def test_a_small_demo_ends_with_zeros() -> None:
    mark = uuid.uuid4().hex
    demo = start_demo(mark, "--orders", "600", "--seconds", "14", "--seed", "7")
    output, _ = demo.communicate(timeout=170)
    assert demo.returncode == 0, output.decode()
    assert b"every order counted once" in output
    assert b"SIGKILL" in output
    assert b"SIGSTOP" in output
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
