"""A slice of the forked campaign: each boundary of each flow once, some pairs, and whether the checker sees anything.

The campaign is a program of its own: it forks, which a process with pytest's and librdkafka's threads must not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.campaign.forked_case import FLOWS, Case, Kill, random_case
from tests.campaign.forked_without import CASES
from tests.conftest import Addresses
from tests.processes import REPOSITORY

# What must be among the violations: the invariant that the protection is there for.
SEEN_AS = {
    "processed ids": "I2",
    "fence": "I9",
    "position in a second transaction": "I4",
    "position first": "I1",
    "forgetting": "I1",
    "dead letter in a second transaction": "I1",
    "outbox in a second transaction": "I4",
    "parking in a second transaction": "I1",
    "parked row deleted first": "I1",
    "lanes": "I3",
    "charges": "I10",
    "clearing attempts": "I12",
    "asking about calls": "I2",
    "coverage after forgetting": "I2",
    "replay in two transactions": "I1",
    "checkpoint": "I8",
    "rows deleted before the commit": "I8",
}


def campaign(services: Addresses, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.campaign.forked", "--database-url", services.database_url]
    command += ["--work", str(directory), "--report", str(directory / "forked.json"), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def report_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "forked.json").read_text())
    return found


def test_a_crash_at_any_boundary_and_one_in_its_recovery_change_nothing(services: Addresses, tmp_path: Path) -> None:
    """Seen to fail for each protection of forked_without.CASES, by the next test."""
    done = campaign(services, tmp_path, "--stages", "singles,pairs", "--first", "--sample", "25")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = report_of(tmp_path)
    assert report["violations"] == []
    for stage in ("singles", "pairs"):
        assert report["every"][stage].keys() == FLOWS.keys()
        for flow, (good, of) in report["every"][stage].items():
            assert good == of > 0, f"{stage} of {flow}: {good} of {of}"
    # Every process that was to be killed was: at a boundary that is not reached, nothing is shown.
    for flow, passed in report["points"].items():
        assert sum(passed.values()) >= report["every"]["singles"][flow][1], flow


def test_a_protection_taken_away_is_noticed(services: Addresses, tmp_path: Path) -> None:
    """Seen to fail with the checks of that invariant taken out of forked_check."""
    done = campaign(services, tmp_path, "--without", "all")
    told = {line.split(":", 1)[0].removeprefix("without "): line for line in done.stdout.splitlines()}
    assert told.keys() >= SEEN_AS.keys() == CASES.keys()
    for name, invariant in SEEN_AS.items():
        assert f"{invariant}: " in told[name], told[name]
    assert done.returncode == 0


def test_an_interrupted_campaign_goes_on_where_it_was(services: Addresses, tmp_path: Path) -> None:
    """Seen to fail with Report.load returning an empty one."""
    options = ("--stages", "random", "--flow", "consume", "--seed", "5", "--lanes", "1")
    campaign(services, tmp_path, *options, "--kills", "1")
    first = report_of(tmp_path)
    campaign(services, tmp_path, *options, "--kills", str(first["kills"] + 1))
    second = report_of(tmp_path)
    assert second["kills"] > first["kills"]
    assert second["cycles"] > first["cycles"]
    assert second["seeds"]["5"] > first["seeds"]["5"]


@pytest.mark.parametrize("cycle", [0, 1, 77])
def test_a_cycle_is_what_its_name_says(cycle: int) -> None:
    """Seen to fail with the dice of Case.logs seeded by nothing."""
    case = random_case(3, cycle)
    again = Case.parse(str(case))
    assert (again.kills, again.logs) == (case.kills, case.logs)
    assert random_case(3, cycle) == case


def test_a_kill_is_read_as_it_is_written() -> None:
    """Seen to fail with "freeze" and "later" exchanged in Kill.parse."""
    for kill in (Kill("db.committing", 3), Kill("db.committing", 3, "later"), Kill("*", 12, "freeze")):
        assert Kill.parse(str(kill)) == kill
