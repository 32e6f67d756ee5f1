"""The table of client errors: what our classes make of every answer that Kafka may give to every request they cause.

    python -m tests.campaign.client_errors --check    compare with client_errors.csv, and write the report
    python -m tests.campaign.client_errors --write    write client_errors.csv anew; look at the difference

Real classes (`TransactionalProducer`, `IdempotentProducer`, `GroupConsumer`), the real librdkafka, its mock cluster as
the broker (see mock_cluster.py for what that cannot show). Each cell has a cluster and clients of its own. Either way
every cell must keep the rules of client_error_rules.py, and neither way one that breaks a rule gets into the table.

`begin` is not among the calls: it asks Kafka nothing.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eoframework import clock
from tests.campaign.client_error_cells import Cell, Seen, cells, run
from tests.campaign.client_error_rules import RULES, broken_rules
from tests.campaign.report_file import DIRECTORY, client_versions, commit, write_json, write_whole

TABLE = Path(__file__).with_name("client_errors.csv")
REPORT = DIRECTORY / "client_errors.json"
WORKERS = 32
"""Cells side by side, in threads: they wait for the client's timers most of the time."""

_COLUMNS = ("call", "request", "error", "times", "outcome", "at", "committed", "replaced", "found_fenced", "next")
_KEY = 4
_LINES_EVERY = 10.0

Key = tuple[str, ...]
Row = tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """One cell that has been run."""

    cell: Cell
    seen: Seen
    broken: list[str]

    @property
    def row(self) -> Row:
        """What the table says of it."""
        seen = self.seen
        fenced = "yes" if seen.found_fenced else "no"
        committed = "yes" if seen.committed else "no"
        return (seen.outcome, seen.at, committed, _replaced(seen), fenced, seen.next)


def key_of(cell: Cell) -> Key:
    """How the table names it."""
    return (cell.call.name, cell.call.api.name, cell.fault, str(cell.times))


def run_all(wanted: Iterable[Cell], *, workers: int = WORKERS) -> Iterator[Found]:
    """Run cells side by side; each is handed out when it has ended."""
    with ThreadPoolExecutor(workers, thread_name_prefix="cell") as pool:
        running = {pool.submit(run, cell): cell for cell in wanted}
        for done in as_completed(running):
            cell, seen = running[done], done.result()
            yield Found(cell, seen, broken_rules(cell, seen))


def read_table() -> dict[Key, Row]:
    """The table that is checked in."""
    with TABLE.open(newline="") as lines:
        head, *rows = csv.reader(lines)
    assert tuple(head) == _COLUMNS, f"{TABLE}: other columns than this program writes: {head}"
    return {tuple(row[:_KEY]): tuple(row[_KEY:]) for row in rows}


def differs(expected: Row | None, found: Row) -> bool:
    """Whether the table says something else.

    A call that was slow, for whatever reason, has its client replaced: on a busy machine more often than on a quiet
    one. Where it must be, a rule says so.
    """
    return expected is None or _timeless(expected) != _timeless(found)


def _timeless(row: Row) -> Row:
    return tuple("no" if column == "slow" else column for column in row)


def _replaced(seen: Seen) -> str:
    if not seen.replaced:
        return "no"
    return "slow" if seen.outcome == "none" and " ms, so a request may have been sent twice" in seen.why else "yes"


def complaints(found: Iterable[Found], table: Mapping[Key, Row]) -> list[str]:
    """Broken rules, and what is not as the table says."""
    said = []
    for one in found:
        said += [f"{one.cell}: {sentence}" for sentence in one.broken]
        expected = table.get(key_of(one.cell))
        if differs(expected, one.row):
            said.append(f"{one.cell}: the table says {expected}, found {one.row} ({one.seen.why})")
    return sorted(said)


def main(arguments: list[str] | None = None) -> int:
    """0: as it must be. 1: a rule is broken or, with --check, the table says something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare with the table, write the report")
    what.add_argument("--write", action="store_true", help="write the table, and the report")
    parser.add_argument("--workers", type=int, default=WORKERS, help="cells side by side")
    chosen = parser.parse_args(arguments)
    # The clients log each injected error, and 32 of them at once at that.
    logging.getLogger("eoframework").setLevel(logging.CRITICAL)
    started, begun = clock.now().isoformat(timespec="seconds"), clock.monotonic()
    found = _run_and_tell(list(cells()), chosen.workers)
    if chosen.write:
        said = sorted(f"{one.cell}: {sentence}" for one in found for sentence in one.broken)
    else:
        said = complaints(found, read_table())
    if chosen.write and not said:
        _write_table(found)
    write_json(REPORT, _report(found, said, started, clock.monotonic() - begun))
    print("\n".join(said) or f"{len(found)} cells keep {RULES} rules; the table is as it must be.", flush=True)
    return 1 if said else 0


def _run_and_tell(wanted: list[Cell], workers: int) -> list[Found]:
    begun = told = clock.monotonic()
    found: list[Found] = []
    for one in run_all(wanted, workers=workers):
        found.append(one)
        now = clock.monotonic()
        if now - told >= _LINES_EVERY:
            told, rate = now, len(found) / (now - begun)
            left = (len(wanted) - len(found)) / rate
            broken = sum(bool(each.broken) for each in found)
            line = f"{len(found)} of {len(wanted)} cells, {rate:.0f}/s, {left:.0f} s left, {broken} broke a rule"
            print(line, flush=True)
    # In the table's order: a difference is read line by line.
    order = {key_of(cell): at for at, cell in enumerate(wanted)}
    return sorted(found, key=lambda one: order[key_of(one.cell)])


def _write_table(found: list[Found]) -> None:
    lines = [",".join(_COLUMNS)] + [",".join((*key_of(one.cell), *one.row)) for one in found]
    write_whole(TABLE, "\n".join(lines) + "\n")


def _report(found: list[Found], said: list[str], started: str, seconds: float) -> dict[str, Any]:
    classes = Counter(one.seen.outcome for one in found)
    by_call: dict[str, Counter[str]] = {}
    for one in found:
        by_call.setdefault(f"{one.cell.call.name} {one.cell.call.api.name}", Counter())[one.seen.outcome] += 1
    return {
        "layer": "client_errors",
        "what": "Every error that a broker can answer to every request of our Kafka classes, one to three times in a "
        "row, on librdkafka's mock cluster: the class that is raised, whether the producer is replaced, and whether "
        "the next transaction succeeds.",
        "commit": commit(),
        "versions": client_versions(),
        "seeds": [],
        "injected": dict(sorted(Counter(one.cell.fault for one in found).items())),
        "violations": said,
        "seconds": round(seconds, 1),
        "started": started,
        "updated": clock.now().isoformat(timespec="seconds"),
        "cells": len(found),
        "rules": RULES,
        "classes": dict(classes.most_common()),
        "calls": {call: dict(counts.most_common()) for call, counts in by_call.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
