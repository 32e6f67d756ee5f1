"""The crash points: what the source tells, what the table says, and what DESIGN.md shows are the same."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from eoframework.crashtest import points
from eoframework.crashtest.points import BOUNDARIES, FLOWS, NAMES
from tests.campaign import design_table
from tests.conftest import REPOSITORY

NAME = re.compile(r"[a-z]+(\.[a-z_]+)+")
# The one place that passes a name on: what it is called with counts.
PASSED_ON = ("eoframework/db/joined.py", "_tell")


def emitted() -> Iterator[tuple[str, str]]:
    """Every event the source can tell, and where."""
    for path in sorted((REPOSITORY / "eoframework").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Call) and _tells(path, node):
                where = f"{path.relative_to(REPOSITORY)}:{node.lineno}"
                assert node.args, where
                assert isinstance(node.args[0], ast.Constant), f"{where}: an event's name is written where it is told"
                yield str(node.args[0].value), where


def _tells(path: Path, call: ast.Call) -> bool:
    said = ast.unparse(call.func)
    file, function = PASSED_ON
    in_that_file = str(path.relative_to(REPOSITORY)) == file
    return said == function if in_that_file else said in ("events.emit", "emit")


def test_every_event_of_the_source_is_a_boundary_and_the_other_way_round() -> None:
    """Seen to fail with the row of `consume.revoked` taken out of the table, and with its `emit` taken out."""
    told = dict(emitted())
    assert {name: where for name, where in told.items() if name not in NAMES} == {}, "told, but not in the table"
    assert NAMES - told.keys() == set(), "in the table, but told nowhere"
    assert all(NAME.fullmatch(name) for name in NAMES)


def test_design_shows_the_table() -> None:
    """To be written by `python -m tests.campaign.design_table`."""
    assert design_table.written() == design_table.rendered()


def test_a_flow_has_one_row_for_a_name_and_each_row_says_something() -> None:
    assert [name for name, count in Counter((b.flow, b.name) for b in BOUNDARIES).items() if count > 1] == []
    for boundary in BOUNDARIES:
        for said in (boundary.before, boundary.after, boundary.leads_to):
            assert said, boundary
            assert said == said.strip(), boundary
            assert "|" not in said, boundary
    assert {boundary.flow for boundary in BOUNDARIES} == set(FLOWS)


def test_a_flows_boundaries_are_its_own() -> None:
    assert [b for flow in FLOWS for b in points.of(flow)] == list(BOUNDARIES)
    assert {"db.committing", "kafka.polled"} <= {b.name for b in points.of("consume")}
