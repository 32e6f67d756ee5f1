"""Armed `eo` processes in 20 ms: forked from one that has imported everything and opened nothing.

As tests/consume/nursery.py, but each is `python -m eoframework.crashtest.armed` where it is told to crash, and nobody
waits for one: what has ended is asked for all at once. librdkafka is loaded but has no client, so no thread, before the
fork.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from eoframework import bootstrap, cli
from eoframework.crashtest import armed
from eoframework.settings import take_crash_points
from tests.processes import REPOSITORY

IMPORTED = bootstrap
"""Not used here: it is what makes a process slow to start."""


class Zygote:
    """The parent of the processes of one lane; at the end of the block, or of whoever asks, all of them are gone."""

    def __enter__(self) -> Zygote:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaign.full_nursery"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def spawn(self, arguments: list[str], environment: dict[str, str], log: Path) -> int:
        """The pid of a process that runs `eo` with these arguments, armed by EO_CRASH_AT and its like."""
        return int(self._ask({"arguments": arguments, "environment": environment, "log": str(log)}))

    def ended(self) -> dict[int, int]:
        """Processes that have ended since the last call, and how: the exit code, or minus the signal."""
        return {int(pid): code for pid, code in self._ask({"ended": True}).items()}

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())


def main() -> None:
    # Each would look at the whole heap of its parent first (spare_the_collector), and copy it by that.
    gc.collect()
    gc.freeze()
    children: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        if "ended" in question:
            ended = _ended(children)
            children -= set(ended)
            print(json.dumps(ended), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _live(question)
        children.add(pid)
        print(pid, flush=True)
    for pid in children:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _ended(children: set[int]) -> dict[int, int]:
    found = {}
    for pid in children:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            found[pid] = os.waitstatus_to_exitcode(status)
    return found


def _live(question: dict[str, Any]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(question["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(question["environment"])
    code = 1
    try:
        if told := take_crash_points():
            armed.arm(question["arguments"], told)
        code = cli.invoke(question["arguments"])
    except BaseException:  # noqa: BLE001 - nothing may come back into the parent's loop
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
