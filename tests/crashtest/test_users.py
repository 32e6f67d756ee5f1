"""`eo crashtest` on whole apps: a sound one passes, and each plain bug is found and named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eoframework.crashtest.findings import Report
from eoframework.crashtest.user_question import Question, crash_test
from eoframework.crashtest.user_stage import Stage
from eoframework.errors import ConfigurationError
from eoframework.settings import environment
from eoframework.testing import CrashTests
from tests.conftest import REPOSITORY
from tests.crashtest import crash_shop as shop

MODULE = "tests.crashtest.crash_shop"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """One broker and one server for all tests here."""
    with Stage(path=str(REPOSITORY)) as stage:
        yield stage


def crashes(stage: Stage, app: str, *points: str, **more: Any) -> Report:
    given: dict[str, Any] = {
        "metadata": f"{MODULE}:Base.metadata",
        "setup": f"{MODULE}:fill",
        "messages": 12,
        "seed": 1,
    }
    question = Question(reference=f"{MODULE}:{app}", points=points, **{**given, **more})
    return crash_test(question, stage, say=lambda line: print(line, file=sys.stderr))


def test_a_sound_handler_comes_to_the_same_however_it_is_killed(stage: Stage) -> None:
    report = crashes(stage, "sound", "db.committed", "relay.committed")
    assert report.clean, report.text()
    assert {point.point.partition(":")[0] for point in report.points if point.died} >= {
        "db.committed",
        "relay.committed",
    }
    # What a sequence made is another number after a crash, and is known to be.
    assert report.left_out["eo.booking"] == {"id"}
    assert "0 violations in" in report.text()


def test_a_transform_comes_to_the_same_however_it_is_killed(stage: Stage) -> None:
    report = crashes(stage, "sorting", "transform.produced", "transform.committed")
    assert report.clean, report.text()
    assert report.injected >= 2


def test_a_second_connection_is_found_by_its_effects_and_named_by_its_statement(stage: Stage) -> None:
    report = crashes(stage, "elsewhere", "consume.handled")
    (statement,) = [one for one in report.beside if one.kind == "statement"]
    assert "UPDATE stock SET free = free -" in statement.what
    assert any(one.place == "eo.stock" and one.changed for point in report.bad for one in point.differences)
    assert report.history is not None
    assert len(report.history.messages) < report.messages
    assert "killed at consume.handled:1" in report.text()


def test_a_counter_in_memory_is_named(stage: Stage) -> None:
    report = crashes(stage, "counting", minutes=0.0)
    (variable,) = report.beside
    assert (variable.kind, variable.name) == ("variable", f"{MODULE}.COUNT")
    assert "it was 0 and is" in variable.what
    assert crashes(stage, "counting", allowed=(f"{MODULE}.COUNT",), minutes=0.0).beside == []


def test_a_call_inside_the_transaction_is_named_with_its_line(stage: Stage) -> None:
    report = crashes(stage, "calling", minutes=0.0)
    (call,) = report.beside
    assert call.name == "http://127.0.0.1:9/charge"
    assert "tests/crashtest/crash_shop.py:" in call.what


def test_what_is_missing_is_said(stage: Stage, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no table that they could write to.*--metadata"):
        crashes(stage, "elsewhere", metadata="", setup="")
    with pytest.raises(ConfigurationError, match=r"every message was given up.*LookupError: no shelf for sku-"):
        crashes(stage, "strict", setup="")
    sample = tmp_path / "sample.jsonl"
    sample.write_text('{"topic": "crash.orders.v1", "payload": {"order_id": 1}}\n')
    with pytest.raises(ConfigurationError, match=r"sample.jsonl, line 1: DecodeError"):
        crashes(stage, "sound", sample=sample)
    with pytest.raises(ConfigurationError, match=r"there is no point db\.comitted"):
        crashes(stage, "sound", "db.comitted")


def test_from_the_command_line_the_example_shop_passes() -> None:
    arguments = ["examples.shop.app:app", "--metadata", "examples.shop.app:Base.metadata", "--json", "--seed", "5"]
    arguments += ["--setup", f"{MODULE}:deliver_goods"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "eoframework.cli",
            "crashtest",
            *arguments,
            "--messages",
            "10",
            "--points",
            "db.committing",
        ],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["clean"]
    assert document["injected"] >= 2


def test_the_fixture_takes_messages_of_the_test(eo_crash: CrashTests) -> None:
    messages = [(shop.orders, shop.Placed(order_id=number, sku="sku-1", qty=1)) for number in range(6)]
    more: dict[str, Any] = {
        "metadata": f"{MODULE}:Base.metadata",
        "setup": f"{MODULE}:fill",
        "points": ["consume.handled"],
    }
    assert eo_crash(f"{MODULE}:sound", *messages, **more).injected
    with pytest.raises(AssertionError, match=r"elsewhere does not do the same when it is killed(.|\n)*UPDATE stock"):
        eo_crash(f"{MODULE}:elsewhere", *messages, **more)
