"""Where the processes of a campaign come from: one that has imported everything, and has nothing open.

A fork of it is a process of its own after 3 ms. It opens its own connection, runs our code, and is killed at a
durability boundary; the next one takes over. What it did is told by the database, and by memory that outlives it.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import signal
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection as Channel
from pathlib import Path
from typing import NoReturn

from eoframework import clock, events
from eoframework.db.session import open_database
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.campaign.forked_board import Board
from tests.campaign.forked_broker import LogFile
from tests.campaign.forked_case import ANY, Case, Kill
from tests.campaign.forked_check import serve
from tests.campaign.forked_life import RESTARTED, Life

PROCESSES = 30
"""So many in a row, and one must have come to the end."""
_LONGEST = 40.0
_RESTARTED, _FAILED = 75, 1
_HISTORY_BYTES = 64_000_000
_numbers = itertools.count()


@dataclass
class Ran:
    """What became of one cycle."""

    case: str
    kills: Counter[str] = field(default_factory=Counter)
    """Event -> how many processes were killed there by us."""
    fired: list[str] = field(default_factory=list)
    """The events of these kills, in their order."""
    suicides: int = 0
    """Processes that a message killed."""
    zombies: int = 0
    traces: list[list[str]] = field(default_factory=list)
    """Of each process, the events it passed."""
    endings: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


class History:
    """Append-only; what is about to be done is on the disk before it is done."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def invoke(self, **what: object) -> None:
        self._write({"type": "invoke", **what})
        os.fdatasync(self._file)

    def outcome(self, **what: object) -> None:
        """ok, fail, or unknown: of a killed process nobody knows how far it came."""
        self._write({"type": "outcome", **what})
        if os.fstat(self._file).st_size > _HISTORY_BYTES:
            self._path.replace(self._path.with_suffix(".1"))
            self.__init__(self._path)  # type: ignore[misc]

    def _write(self, line: dict[str, object]) -> None:
        os.write(self._file, json.dumps({"at": clock.now().isoformat(), **line}).encode() + b"\n")


class Lane:
    """Runs cycles one after the other, in one database of its own."""

    def __init__(self, url: str, directory: Path, *, without: Callable[[], None] | None = None) -> None:
        """`without` is called in each forked process: it takes a protection away, to see whether that is noticed."""
        self._settings = Settings.load(database_url=url, kafka_bootstrap_servers="127.0.0.1:1", log_level="error")
        self._database = open_database(self._settings.require_database_url(), Schema())
        self._without = without
        self._facts, self._trace = Board(), Board()
        self._broker = LogFile(directory / "broker.jsonl")
        self._history = History(directory / "history.jsonl")
        self._checker = _fork_checker(url)
        self._warm_up()

    def close(self) -> None:
        self._checker.close()

    def _warm_up(self) -> None:
        # What a dialect asks of the server at its first connection, and what is compiled for the first statement, is
        # the same for every process: it is inherited. No connection is: it is closed before the first fork.
        with self._database.engine.connect() as connection:
            connection.exec_driver_sql("SELECT 1")
        self._database.engine.dispose()
        logging.disable(logging.CRITICAL)
        gc.collect()
        gc.freeze()

    # --- a cycle ---

    def run(self, case: Case) -> Ran:
        """The cycle, from its first process to the check of what is left."""
        ran = Ran(str(case))
        name = f"c{os.getpid()}-{next(_numbers)}"
        self._facts.clear()
        self._broker.empty()
        self._ask("prepare", case, name)
        self._processes(case, name, ran)
        if not ran.violations:
            ran.violations = self._ask("check", case, name, self._facts.lines(), self._broker.transactions())
        self._history.outcome(cycle=name, case=ran.case, check="fail" if ran.violations else "ok")
        return ran

    def _processes(self, case: Case, name: str, ran: Ran) -> None:
        waiting, zombie = list(case.kills), 0
        for number in range(PROCESSES):
            kill = waiting.pop(0) if waiting else None
            self._history.invoke(cycle=name, case=ran.case, process=number, kill=str(kill or ""))
            if number and (case.flow.external or case.flow.relays):
                self._ask("leases end", name)
            pid, ending = self._process(case, name, kill)
            trace = self._trace.lines()
            ran.traces.append([line for line in trace if not line.startswith("!")])
            ran.endings.append(ending)
            self._history.outcome(cycle=name, process=number, outcome=_outcome(ending), how=ending, events=trace[-3:])
            if ending != "ok" and case.seed % 4 == 0:
                ran.violations = self._ask("meanwhile", case, name, self._facts.lines())
                if ran.violations:
                    ran.violations.append(f"seen after process {number}: {ending} {trace[-2:]}")
                    return
            if ending == "killed":
                point = next((line[1:] for line in trace if line.startswith("!")), "")
                if point:
                    ran.fired.append(point)
                    ran.kills[point] += 1
                else:
                    ran.suicides += 1
            elif ending == "frozen":
                zombie = pid
            elif ending.startswith(("failed", "hung")):
                ran.violations.append(f"process {number}: {ending}")
                return
            elif ending == "ok":
                if not zombie:
                    return
                ran.zombies += 1
                self._wake(zombie, ran)
                zombie = 0
        ran.violations.append(f"I10: {PROCESSES} processes, and none of them came to the end: {ran.endings}")

    def _wake(self, pid: int, ran: Ran) -> None:
        """The zombie goes on after its successor has done everything."""
        os.kill(pid, signal.SIGCONT)
        ending = self._end_of(pid)
        ran.endings.append(f"zombie {ending}")
        if ending.startswith(("failed", "hung")):
            ran.violations.append(f"zombie: {ending}")

    def _process(self, case: Case, name: str, kill: Kill | None) -> tuple[int, str]:
        self._trace.clear()
        pid = os.fork()
        if pid == 0:
            self._live(case, name, kill)
        return pid, self._end_of(pid)

    def _end_of(self, pid: int) -> str:
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return "frozen"
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGALRM:
            return f"hung for {_LONGEST:g} s after {self._trace.lines()[-3:]}"
        texts = {0: "ok", _RESTARTED: "restarted", -signal.SIGKILL: "killed"}
        error = next((line for line in reversed(self._facts.lines()) if line.startswith("error ")), "")
        return texts.get(code, f"failed with {code}: {error}")

    def _live(self, case: Case, name: str, kill: Kill | None) -> NoReturn:
        code = _FAILED
        try:
            signal.setitimer(signal.ITIMER_REAL, _LONGEST)
            events.subscribe(Arms(kill, self._trace).on_event)
            if self._without is not None:
                self._without()
            Life(case, name, self._facts, self._database, self._settings, self._broker).run()
            code = 0
        except RESTARTED:
            code = _RESTARTED
        except BaseException:  # noqa: BLE001 - told to the parent; nothing may come back into its code
            self._facts.note(f"error {traceback.format_exc()}")
        os._exit(code)

    def _ask(self, *question: object) -> list[str]:
        self._checker.send(question)
        answer: list[str] = self._checker.recv()
        return answer


class Arms:
    """Notes every event on the board, and ends the process at the one it is armed for."""

    def __init__(self, kill: Kill | None, trace: Board) -> None:
        self._kill = kill
        self._trace = trace
        self._hits = 0

    def on_event(self, name: str, fields: dict[str, object]) -> None:
        self._trace.note(name)
        kill = self._kill
        if kill is None or kill.point not in (name, ANY):
            return
        self._hits += 1
        if self._hits != kill.nth:
            return
        self._trace.note(f"!{name}{'+' if kill.how == 'later' else ''}")
        if kill.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kill.how == "later":
            threading.Thread(target=_die_soon, daemon=True).start()
        else:
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def _die_soon() -> None:
    clock.sleep(clock.jitter(0.0, 0.002))
    os.kill(os.getpid(), signal.SIGKILL)


def _outcome(ending: str) -> str:
    return {"ok": "ok", "killed": "unknown", "frozen": "unknown", "restarted": "unknown"}.get(ending, "fail")


def _fork_checker(url: str) -> Channel:
    """Who looks at the database: another process, so that the one that forks has no connection."""
    ours, theirs = Pipe()
    if os.fork() == 0:
        ours.close()
        try:
            serve(theirs, url)
        except BaseException:  # noqa: BLE001 - told here: who asks only sees that nobody answers
            traceback.print_exc()
        finally:
            os._exit(0)
    theirs.close()
    return ours
