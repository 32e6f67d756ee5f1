"""What the tests of the development services share: the command line as a process, and the search for leftovers."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from eoframework import dev
from eoframework.dev import processes

ROOT = Path(dev.__file__).parents[2]


def eo_dev(*arguments: str | Path | int, start_new_session: bool = False) -> subprocess.Popen[str]:
    """`eo dev …` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "eoframework.cli.dev", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
        # A run started in the background by a shell ignores SIGINT, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads before exec
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a process that ends by itself."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def running_in(directory: Path) -> list[psutil.Process]:
    """Every living process whose command line or working directory lies in `directory`."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "status"]):
        words = [*(process.info["cmdline"] or []), process.info["cwd"] or ""]
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(directory) in word for word in words):
            found.append(process)
    return found


def services_in(directory: Path) -> list[psutil.Process]:
    """Of those, the broker and the database server."""
    return [process for process in running_in(directory) if names([process]) & {"java", "postgres"}]


def nothing_runs_in(directory: Path, *, seconds: float = 60) -> bool:
    """Whether all processes of `directory` are gone within the deadline."""
    return processes.wait_until(lambda: not running_in(directory), seconds)


@pytest.fixture
def state_dir(tmp_path: Path) -> Iterator[Path]:
    """A state directory whose services are gone after the test, whatever it did."""
    directory = tmp_path / ".eo"
    yield directory
    dev.reset(directory)
    assert nothing_runs_in(directory)


def descendants(pid: int) -> list[psutil.Process]:
    """The children of a process and theirs."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def names(family: list[psutil.Process]) -> set[str]:
    """The programs' names of those that still run."""
    found = set()
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.add(process.name())
    return found


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def words_in(directory: Path) -> set[str]:
    """Every word of every command line that runs in `directory`."""
    return {word for process in running_in(directory) for word in process.info["cmdline"] or []}
