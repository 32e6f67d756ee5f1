"""A slice of the cuts: whole rounds on the tests' own services, and rounds without a recovery, which must show."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.campaign import report
from tests.campaign.cuts_check import Line, same
from tests.campaign.cuts_fates import CALLS, Call, Fates
from tests.campaign.cuts_lane import run_round
from tests.campaign.cuts_postgres import Conversation
from tests.campaign.cuts_report import Report
from tests.campaign.cuts_world import Plan, Result
from tests.conftest import Addresses

# The client tells of a transaction that it cannot abort because the commit it gave up is under way: on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Producer abort_transaction failed during close:RuntimeWarning")


class Live:
    """Makes rounds."""

    def __init__(self, services: Addresses, template: str, directory: Path) -> None:
        self._services, self._template, self.directory = services, template, directory

    def __call__(self, seed: str, *, messages: int, without: str = "", **shares: float) -> Result:
        drawn: dict[Call, float] = {call: shares.get(call, 0.0) for call in CALLS}
        plan = Plan(seed, messages=messages, without=without, longest=30, shares=drawn)
        return run_round(self._services, self._template, plan, self.directory)

    def until(self, sign: str, seed: str, *, messages: int, without: str, **shares: float) -> Result:
        """The first of a few rounds in which something violated matches: what a cut hits depends on the moment."""
        for number in range(5):
            result = self(f"{seed}{number}", messages=messages, without=without, **shares)
            if any(re.search(sign, text) for text in result.violations):
                return result
        raise AssertionError(f"without {without} nothing is seen: {result.violations}")


@pytest.fixture
def live(services: Addresses, template: str, tmp_path: Path) -> Live:
    return Live(services, str(make_url(template).database), tmp_path)


def test_nothing_is_lost_or_doubled_by_cuts(live: Live) -> None:
    """The same recoveries, removed: the tests below."""
    result = live("1:0", messages=12, COMMIT=0.7, EndTxn=0.6)
    assert result.violations == []
    assert result.tally.cuts("COMMIT") > 10
    assert result.tally.cuts("EndTxn") > 5
    ends = ("a batch", "the relay's delete", "a web application's publish")
    assert all(result.tally.places[f"COMMIT of {what}"] for what in ends), result.tally.places
    assert not list(live.directory.iterdir()), "what nobody has to look at is thrown away"


def test_without_asking_the_position(live: Live) -> None:
    """A batch whose COMMIT had happened is booked again: by row, by sum, and with what it published."""
    result = live.until("^entries: ", "1:1", messages=16, without="position", COMMIT=0.8)
    found = "\n".join(result.violations)
    assert "doubled" in found
    assert "account " in found


def test_without_the_checkpoint(live: Live) -> None:
    """Rows that Kafka has, and whose delete was cut before the server saw it, are published again."""
    result = live.until("^(visits|bookings): .* doubled", "1:2", messages=12, without="checkpoint", COMMIT=0.8)
    assert Path(result.log).exists(), "what was found is to be looked at"


def test_a_seed_is_a_plan() -> None:
    """The same fates in the same order; other seeds, other fates; and something always gets through."""

    def drawn(seed: str, share: float) -> list[str | None]:
        fates = Fates(seed, shares={"COMMIT": share, "EndTxn": 0.5})
        return [fates.draw("COMMIT", "a batch") for _ in range(200)]

    assert drawn("1:1", 0.5) == drawn("1:1", 0.5) != drawn("1:2", 0.5)
    assert {None, "before", "during", "after"} == set(drawn("1:1", 0.5))
    assert drawn("1:1", 1.0).count(None) == 50
    assert Plan("1:1").drawn() == Plan("1:1").drawn()


def test_what_a_commit_is_of() -> None:
    """By the statements of its transaction alone, also where they were prepared long before, and arrive in pieces."""
    said = Conversation()
    start = struct.pack(">ii", 8, 196608)
    assert [said.hear(start[:5]), said.hear(start[5:])] == [None, None]
    prepare = _message(b"P", b"one\0" + b'DELETE FROM "eo".outbox_message\0' + b"\0\0")
    assert said.hear(prepare) is None
    begin, bind, commit = _message(b"Q", b"BEGIN\0"), _message(b"B", b"\0one\0rest"), _message(b"Q", b"COMMIT\0")
    assert said.hear(begin + commit) == ""
    assert said.hear(begin + bind + commit[:6]) is None
    assert said.hear(commit[6:]) == "the relay's delete"
    assert said.hear(begin) is None
    assert said.hear(_message(b"Q", b"INSERT INTO visit VALUES (1)\0")) is None
    assert said.hear(commit) == "a web application's publish"


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack(">i", len(body) + 4) + body


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("a0 a1 b0", []),
        ("b0 a0 a1", []),
        ("a0 b0", ["rows: 1 lost"]),
        ("a0 a1 a1 b0", ["rows: 1 doubled"]),
        ("a0 a1 b0 c0", ["rows: 1 that nobody made"]),
        ("a1 a0 b0", ["rows: key a out of order"]),
    ],
)
def test_what_is_compared(found: str, said: list[str]) -> None:
    lines = [Line(one[0], int(one[1])) for one in found.split()]
    assert [text.split(": [")[0] for text in same("rows", lines, [Line("a", 0), Line("a", 1), Line("b", 0)])] == said


def test_the_report_adds_up(tmp_path: Path) -> None:
    """Rounds, cuts and violations, and where the next run goes on; the page says no more than was seen."""
    path = tmp_path / "cuts.json"
    fates = Fates("7:4", shares={"COMMIT": 1.0, "EndTxn": 0.0})
    while fates.draw("COMMIT", "a batch") is not None:
        pass
    for number in (4, 5):
        again = Report(path)
        again.add(Result(f"7:{number}", fates.tally, [], 1.0))
        again.write(seconds=1.0, versions={})
    assert (again.cuts("COMMIT"), again.cuts("EndTxn"), again.next_run(7), again.next_run(8)) == (6, 0, 6, 0)
    assert json.loads(path.read_text())["rounds"] == 2
    assert "0 violations in 6 injected cuts (rule of three: < 5.0e-01 at 95 %)" in report.render(tmp_path)
    again.add(Result("7:6", fates.tally, ["entries: 1 lost"], 1.0))
    again.write(seconds=1.0, versions={})
    assert "1 violations in 9 injected cuts" in report.render(tmp_path)
    assert "rule of three: <" not in report.render(tmp_path)
