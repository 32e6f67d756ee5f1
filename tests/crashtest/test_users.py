"""`eo crashtest` on whole apps: a sound one passes, and each plain bug is found and named."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eoframework.cloudevents import MESSAGE_ID
from eoframework.crashtest.findings import Report
from eoframework.crashtest.load import generated, of_sample
from eoframework.crashtest.user_prepare import prepare
from eoframework.crashtest.user_question import Question, crash_test, refuse_what_cannot_be
from eoframework.crashtest.user_sources import named_by_handlers
from eoframework.crashtest.user_stage import Stage, surroundings
from eoframework.errors import ConfigurationError
from eoframework.settings import Settings
from eoframework.testing import CrashTests
from tests.conftest import REPOSITORY
from tests.crashtest import crash_shop as shop

MODULE = "tests.crashtest.crash_shop"
NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"


@pytest.fixture(scope="module")
def stage(eo_crash: CrashTests) -> Stage:
    """One broker and one server for all tests here."""
    return eo_crash.stage()


def crashes(stage: Stage, app: str, *points: str, **more: Any) -> Report:
    given: dict[str, Any] = {
        "metadata": f"{MODULE}:Base.metadata",
        "setup": f"{MODULE}:fill",
        "messages": 12,
        "seed": 1,
    }
    question = Question(**{"reference": f"{MODULE}:{app}", "points": points, **given, **more})
    return crash_test(question, stage, say=lambda line: print(line, file=sys.stderr))


def test_a_sound_handler_comes_to_the_same_however_it_is_killed(stage: Stage) -> None:
    report = crashes(stage, "sound", "db.committed", "relay.committed")
    assert report.clean, report.text()
    assert {point.point.partition(":")[0] for point in report.points if point.died} >= {
        "db.committed",
        "relay.committed",
    }
    # What a sequence made is another number after a crash, and is known to be.
    assert report.left_out["public.booking"] == {"id"}
    assert "0 violations in" in report.text()


def test_a_transform_comes_to_the_same_however_it_is_killed(stage: Stage) -> None:
    report = crashes(stage, "sorting", "transform.produced", "transform.committed")
    assert report.clean, report.text()
    assert report.injected >= 2


def test_a_second_connection_is_found_by_its_effects_and_named_by_its_statement(stage: Stage) -> None:
    report = crashes(stage, "elsewhere", "consume.handled", messages=5)
    (statement,) = [one for one in report.beside if one.kind == "statement"]
    assert "UPDATE stock SET free = free -" in statement.what
    assert "outside its transaction at " in statement.what
    assert "tests/crashtest/crash_shop.py:" in statement.what
    assert any(one.place == "public.stock" and one.changed for point in report.bad for one in point.differences)
    assert report.history is not None
    assert len(report.history.messages) < report.messages
    assert "killed at consume.handled:1" in report.text()


def test_a_counter_in_memory_is_named(stage: Stage) -> None:
    report = crashes(stage, "counting", minutes=0.0)
    (variable,) = report.beside
    assert (variable.kind, variable.name) == ("variable", f"{MODULE}.COUNT")
    assert "it was 0 and is" in variable.what
    assert "tests/crashtest/crash_shop.py:" in variable.what
    assert crashes(stage, "counting", allowed=(f"{MODULE}.COUNT",), minutes=0.0).beside == []


def test_where_values_come_from_that_are_not_compared_is_named(stage: Stage) -> None:
    report = crashes(stage, "timed", minutes=0.0)
    assert report.left_out["public.booking"] == {"id", "number"}
    (asked,) = report.chance
    assert asked.startswith("datetime.now at ")
    assert "tests/crashtest/crash_shop.py:" in asked
    assert f"comes from: {asked}" in report.text()


def test_a_call_inside_the_transaction_is_named_with_its_line(stage: Stage) -> None:
    report = crashes(stage, "calling", minutes=0.0)
    (call,) = report.beside
    assert call.name == "http://127.0.0.1:9/charge"
    assert "tests/crashtest/crash_shop.py:" in call.what


def test_a_load_that_is_given_up_whole_is_refused(stage: Stage) -> None:
    with pytest.raises(ConfigurationError, match=r"every message was given up.*LookupError: no shelf for sku-"):
        crashes(stage, "strict", setup="")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"sample": "sample.jsonl"}, r"sample.jsonl, line 1: DecodeError"),
        ({"sample": "bytes.jsonl"}, r"bytes.jsonl cannot be read: 'utf-8' codec"),
        ({"metadata": f"{MODULE}:Base"}, r"is the class Base, no MetaData"),
        ({"setup": f"{MODULE}:orders"}, r"is of type Topic, no function"),
        ({"setup": "nothing.here:fill"}, r"there is no module 'nothing'"),
        ({"topics": ("nope",)}, r"--topic nope: no handler reads it"),
    ],
)
def test_what_is_not_there_is_said_by_the_application_s_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], says: str
) -> None:
    (tmp_path / "sample.jsonl").write_text('{"topic": "crash.orders.v1", "payload": {"order_id": 1}}\n')
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    given = {"reference": f"{MODULE}:sound", "metadata": f"{MODULE}:Base.metadata", "setup": f"{MODULE}:fill", **more}
    if "sample" in more:
        given["sample"] = tmp_path / more["sample"]
    monkeypatch.setenv("EO_DATABASE_URL", NOWHERE)
    with pytest.raises(ConfigurationError, match=says):
        prepare(Question(**given).document(NOWHERE, given=False, look=True))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, r"no table that they could write to.*--metadata"),
        (
            {"reference": "tests.crashtest.unimportable:app"},
            r'prepared:\nTraceback .*\n  File ".*unimportable.py", line',
        ),
        ({"points": ("db.comitted",)}, r"there is no point 'db\.comitted'. Did you mean 'db\.committed'"),
        ({"migrate": "no-such-program upgrade"}, r"there is no program 'no-such-program'"),
        ({"migrate": "alembic 'upgrade"}, r"No closing quotation"),
        ({"variables": ("A=B",)}, r"'A=B' is no variable"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_started(more: dict[str, Any], says: str) -> None:
    """Nothing is connected to either: the database and the Kafka that the application is told of refuse."""
    with pytest.raises(ConfigurationError, match=says):
        refuse_what_cannot_be(Question(**{"reference": f"{MODULE}:sound", **more}), path=str(REPOSITORY))


def test_how_the_real_cluster_is_reached_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail without EO_KAFKA_SECURITY_PROTOCOL: the app's processes asked a broker of ours for SASL."""
    (tmp_path / ".env").write_text("EO_KAFKA_SECURITY_PROTOCOL=SASL_SSL\nEO_DATABASE_URL=postgresql://real@host/real\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EO_KAFKA_SASL_USERNAME", "real")
    variables = surroundings(["EO_DATABASE_URL"], NOWHERE, "127.0.0.1:1", path="")
    assert "EO_KAFKA_SASL_USERNAME" not in variables
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    assert settings.kafka["security.protocol"] == "PLAINTEXT"
    assert "127.0.0.1:1/nothing" in settings.require_database_url()


def test_topics_that_handlers_fill_are_told_by_their_code() -> None:
    assert named_by_handlers(shop.chained.handlers) == {shop.booked.name}
    assert named_by_handlers(shop.sound.handlers) == {shop.booked.name}
    assert named_by_handlers(shop.calling.handlers) == frozenset()


def test_a_line_of_the_report_is_a_line_of_a_sample(tmp_path: Path) -> None:
    load = generated([shop.orders], messages=5, seed=3)
    (tmp_path / "lines").write_text("".join(f"{one}\n" for one in load))
    again = of_sample(shop.sound, [shop.orders], tmp_path / "lines")
    assert [(one.topic, one.key, one.value, dict(one.headers)[MESSAGE_ID]) for one in again] == [
        (one.topic, one.key, one.value, dict(one.headers)[MESSAGE_ID]) for one in load
    ]


def test_a_chain_whose_topic_in_the_middle_is_read_too_gets_messages_at_its_beginning_only(stage: Stage) -> None:
    """Seen not to come to its end without `filled`: ids of ours met those of the app in one table."""
    report = crashes(stage, "chained", minutes=0.0)
    assert report.clean, report.text()
    assert report.messages <= 10


def test_the_example_shop_passes(stage: Stage) -> None:
    more = {"reference": "examples.shop.app:app", "metadata": "examples.shop.app:Base.metadata"}
    report = crashes(stage, "", "db.committing", setup=f"{MODULE}:deliver_goods", messages=10, seed=5, **more)
    assert report.clean, report.text()
    document = json.loads(json.dumps(report.document()))
    assert (document["clean"], document["doubled"], document["unresolved"]) == (True, 0, 0)
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
        eo_crash(f"{MODULE}:elsewhere", *messages, **more, minutes=0.0)
