"""Processes of the application in milliseconds: forked from one that has imported eoframework, and opened nothing.

    python -m eoframework.crashtest.user_nursery

answers JSON documents, one a line: {"arguments", "environment", "log"} forks a process that is `user_child` with these
arguments, and answers its pid; {"ended": pid} answers how it ended, null while it runs. When standard input ends, every
process ends: nobody else would end them, should the one who started them be killed.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import typer

from eoframework.crashtest import user_child
from eoframework.settings import replace_environment

IMPORTED = typer
"""Not used here: like the rest, it is what makes a process slow to start."""


class Nursery:
    """The parent of the application's processes; at the end of the block all of them are gone."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """environment: of the parent itself, for where Python looks for modules."""
        self._environment = dict(environment)

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "eoframework.crashtest.user_nursery"],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def spawn(self, arguments: Sequence[str], *, environment: Mapping[str, str], log: Path) -> int:
        """The pid of a new process."""
        document = {"arguments": list(arguments), "environment": dict(environment), "log": str(log)}
        return int(self._ask(document))

    def ended(self, pid: int) -> int | None:
        """How it ended: the exit code, or minus the signal; None while it runs. To be asked until it has ended."""
        found = self._ask({"ended": pid})
        return None if found is None else int(found)

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def main() -> None:
    """See the module."""
    # Ctrl-C goes to the whole group: whoever started us ends what is to end, in its order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children: set[int] = set()
    for line in sys.stdin:
        question = json.loads(line)
        answer: int | None
        if "ended" in question:
            answer = _ended(question["ended"])
            children -= {question["ended"]} if answer is not None else set()
        else:
            answer = os.fork()
            if answer == 0:
                _live(question)
            children.add(answer)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    for pid in children:
        # Gone already, or gone now: either will do.
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _ended(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _live(question: dict[str, Any]) -> None:
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    log = os.open(question["log"], append, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    replace_environment(question["environment"])
    code = 1
    try:
        user_child.main(question["arguments"])
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:  # noqa: BLE001 - nothing may come back into the parent's loop
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
