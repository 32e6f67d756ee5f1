"""`eo position`: the remedies that fail-closed errors name."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import APP, Shell
from tests.processes import eventually

EPOCH = "SELECT max(epoch) FROM eo.position p JOIN eo.consumer c ON c.id = p.consumer_id WHERE c.name LIKE '%.book'"


@pytest.fixture
def drained(shell: Shell) -> Shell:
    """Ten orders booked; nobody runs."""
    shell.publish(0, 10)
    shell.run("relay", APP, "--once")
    shell.run("run", APP, "--once", "--handler", "book")
    return shell


def test_show(drained: Shell) -> None:
    lines = json.loads(drained.run("position", "show", drained.consumer, "--json").stdout)
    assert [(line["topic"], line["partition"]) for line in lines] == [(drained.orders, 0), (drained.orders, 1)]
    assert all(line["owner"] is None for line in lines)
    assert drained.consumer in drained.run("position", "show").stdout
    assert "Did you mean" in drained.run("position", "show", drained.consumer + "s", code=5).stderr


def test_set_goes_back_and_processed_messages_stay_duplicates(drained: Shell) -> None:
    before = drained.scalar(EPOCH)
    for partition in ("0", "1"):
        moved = drained.run("position", "set", drained.consumer, partition, "earliest", "--json")
        assert json.loads(moved.stdout)["next_offset"] == 0
        assert json.loads(moved.stdout)["group_follows"]
        assert "moved by hand" in moved.stderr
    assert drained.scalar(EPOCH) == before + 1
    drained.run("run", APP, "--once", "--handler", "book")
    assert drained.scalar("SELECT count(*) FROM booking") == 10
    # Without the ids they would have been booked again: it really went back.
    drained.run("position", "set", drained.consumer, "0", "0")
    drained.run("position", "set", drained.consumer, "1", "0")
    with drained.database.begin("test") as connection:
        connection.exec_driver_sql("DELETE FROM eo.processed_message")
    drained.run("run", APP, "--once", "--handler", "book")
    assert drained.scalar("SELECT count(*) FROM booking") == 20


def test_set_moves_a_running_worker(drained: Shell) -> None:
    """Seen to fail with the partition's error in Kafka's answer ignored: it said that the group's offset was set."""
    process = drained.start("run", APP, "--handler", "book")
    eventually(lambda: process.output().count("claimed") >= 2, "it claims", log=process.log)
    with drained.database.begin("test") as connection:
        connection.exec_driver_sql("DELETE FROM eo.processed_message")
    for partition in ("0", "1"):
        moved = drained.run("position", "set", drained.consumer, partition, "earliest", "--json")
        assert not json.loads(moved.stdout)["group_follows"]
    drained.publish(100, 20)
    drained.run("relay", APP, "--once")
    eventually(lambda: drained.scalar("SELECT count(*) FROM booking") == 40, "booked from 0 again", log=process.log)
    assert process.stop() == 0


def test_what_cannot_be_set(drained: Shell) -> None:
    before = drained.run("position", "show").stdout
    for arguments, code, says in (
        (("0", "999999"), 5, "has offsets 0 to"),
        (("7", "0"), 5, "has no position in partition 7"),
        (("0", "soon"), 3, "earliest or latest"),
    ):
        assert says in drained.run("position", "set", drained.consumer, *arguments, code=code).stderr
    assert drained.run("position", "show").stdout == before


def test_forget_is_refused_while_it_runs_and_makes_a_first_start(drained: Shell) -> None:
    """Seen to fail with the check of owners removed from ops.py: the running worker began again at 0."""
    process = drained.start("run", APP, "--handler", "book")
    eventually(lambda: process.output().count("claimed") >= 2, "it claims", log=process.log)
    assert "is running" in drained.run("position", "forget", drained.consumer, code=70).stderr
    assert process.stop() == 0
    assert "2 positions forgotten" in drained.run("position", "forget", drained.consumer).stdout
    assert drained.consumer not in drained.run("position", "show").stdout
    drained.run("position", "forget", drained.consumer, code=5)
    drained.run("run", APP, "--once", "--handler", "book")
    lines = json.loads(drained.run("position", "show", drained.consumer, "--json").stdout)
    assert [line["epoch"] for line in lines] == [1, 1]
    assert drained.scalar("SELECT count(*) FROM booking") == 10
