"""A slice of the full campaign: whole runs on the tests' own broker, and runs without a protection, which must show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.campaign import report
from tests.campaign.checker import by_invariant
from tests.campaign.full_nursery import Zygote
from tests.campaign.full_places import template_database
from tests.campaign.full_world import Plan, World
from tests.campaign.nemeses import Role, flow_of, lives, points_of
from tests.conftest import Addresses

POINTS = (
    "consume.claimed",
    "consume.handled",
    "db.committing",
    "db.committed",
    "kafka.transaction.committing",
    "kafka.transaction.committed",
    "relay.committed",
    "transform.produced",
)


@pytest.fixture(scope="module")
def stage(services: Addresses, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Addresses, str, Zygote]]:
    """What runs have in common."""
    name = f"campaign_{make_url(services.database_url).port}_{tmp_path_factory.getbasetemp().name.replace('-', '_')}"
    with template_database(services, name) as template, Zygote() as zygote:
        yield services, template, zygote


def world(stage: tuple[Addresses, str, Zygote], directory: Path, plan: Plan) -> World:
    return World(*stage, directory, plan)


def test_killed_at_points(stage: tuple[Addresses, str, Zygote], tmp_path: Path) -> None:
    """The same protections, removed: the tests below."""
    plan = Plan("ci", kills=10, longest=30, only=POINTS, gentle=True)
    result = world(stage, tmp_path, plan).run()
    assert result.violations == []
    assert result.tally.points, "nothing was killed at a point"
    assert result.sent
    assert not list(tmp_path.iterdir()), "what nobody has to look at is thrown away"


def test_without_processed_ids_and_the_fence(stage: tuple[Addresses, str, Zygote], tmp_path: Path) -> None:
    """A producer's duplicates have their effect twice, and no id says that they had it."""
    plan = Plan("ids", kills=4, longest=15, gentle=True, roles=("book",), without="ids", patience=10)
    found = by_invariant(world(stage, tmp_path, plan).run().violations)
    assert {"I2", "I4"} <= found.keys(), found


def test_without_the_checkpoint(stage: tuple[Addresses, str, Zygote], tmp_path: Path) -> None:
    """A batch that Kafka has, and whose rows were not deleted, is published again."""
    plan = Plan(
        "checkpoint",
        kills=4,
        longest=30,
        only=("relay.committed", "kafka.transaction.committed", "consume.claimed"),
        gentle=True,
        roles=("book", "relay"),
        without="checkpoint",
        patience=10,
    )
    found = by_invariant(world(stage, tmp_path, plan).run().violations)
    assert "I8" in found, found


@pytest.mark.parametrize("role", ["book", "crumble", "relay"])
def test_a_seed_is_a_plan(role: Role) -> None:
    """The same faults in the same order; other seeds, other faults. Every crash point is drawn."""
    one, again, other = (lives(seed, role) for seed in ("1:1", "1:1", "1:2"))
    first = [next(one) for _ in range(2000)]
    assert first == [next(again) for _ in range(2000)]
    assert first != [next(other) for _ in range(2000)]
    assert {fate.point for fate in first if fate.kind == "point"} == set(points_of(role))
    assert {fate.kind for fate in first} == {"point", "moment", "term", "pause", "freeze", "raise"}
    assert flow_of(role) in ("consume", "transform", "relay")


def test_the_report_says_no_more_than_was_seen(tmp_path: Path) -> None:
    layer = {"layer": "x", "what": "Something.", "commit": "abc", "violations": [], "injected": {"kill -9": 3000}}
    (tmp_path / "x.json").write_text(json.dumps(layer))
    assert "0 violations in 3,000 injected crashes (rule of three: < 1.0e-03 at 95 %)" in report.render(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({**layer, "violations": [{"invariant": "I1"}]}))
    assert "1 violations in 3,000 injected crashes" in report.render(tmp_path)
    assert "rule of three: <" not in report.render(tmp_path)
