"""`eo reprocess` as a person types it: counted, asked, refused; nothing is done that was not agreed to."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import text

from tests.cli.conftest import APP, Shell

AGAIN = ("reprocess", APP, "book")


@pytest.fixture
def drained(shell: Shell) -> Shell:
    """Ten orders booked; nobody runs."""
    shell.publish(0, 10)
    shell.run("relay", APP, "--once")
    shell.run("run", APP, "--once", "--handler", "book")
    return shell


def booked(shell: Shell) -> int:
    return shell.scalar("SELECT count(*) FROM booking")


def test_counted_asked_and_done(drained: Shell) -> None:
    document = json.loads(drained.run(*AGAIN, "--from", "earliest", "--dry-run", "--json").stdout)
    assert document["refused"] is None
    assert document["plan"]["counts"]["duplicates"] == 10
    assert {span["partition"] for span in document["plan"]["ranges"]} == {0, 1}
    assert "duplicates 10" in drained.run(*AGAIN, "--from", "1h").stdout
    assert drained.scalar("SELECT count(*) FROM eo.audit") == 0, "there was nothing to run"
    with drained.database.begin("test") as connection:
        connection.execute(text("DELETE FROM eo.processed_message"))  # as if they had been skipped
    for answer in ("", "n\n", "\n"):
        refused = drained.run(*AGAIN, "--from", "earliest", stdin=answer, code=2)
        assert "Run 10 messages?" in refused.stderr
        assert "Nothing was done" in refused.stderr
    assert booked(drained) == 10
    done = json.loads(drained.run(*AGAIN, "--from", "earliest", "--json", stdin="y\n").stdout)
    assert (done["result"]["ran"], done["result"]["failed"], done["finished"]) == (10, 0, True)
    assert booked(drained) == 20
    assert drained.scalar("SELECT count(*) FROM eo.audit") == 2


def test_forget_asks_for_the_number(drained: Shell) -> None:
    forget = (*AGAIN, "--from", "earliest", "--forget")
    assert "would run: 10" in drained.run(*forget, "--dry-run").stdout
    for arguments, answer in (((), "y\n"), ((), "9\n"), (("--yes",), ""), (("--yes-repeat", "9"), "")):
        assert "Nothing was done" in drained.run(*forget, *arguments, stdin=answer, code=2).stderr
    assert booked(drained) == 10
    assert "A SECOND TIME. Type 10:" in drained.run(*forget, stdin="10\n").stderr
    assert booked(drained) == 20
    drained.run(*forget, "--yes-repeat", "10")
    assert booked(drained) == 30


def test_what_is_refused(drained: Shell) -> None:
    with drained.database.begin("test") as connection:
        connection.execute(
            text(
                "INSERT INTO eo.coverage (consumer_id, topic_id, partition, covered_from) "
                "SELECT consumer_id, topic_id, partition, next_offset FROM eo.position"
            )
        )
    assert "refused: " in drained.run(*AGAIN, "--from", "earliest", "--dry-run", code=4).stdout
    assert "covered from" in drained.run("position", "show", drained.consumer).stdout
    for arguments, code, says in (
        (("--from", "earliest", "--yes"), 70, "--forget"),
        (("--from", "3"), 5, "--partition"),
        (("--from", "0", "--partition", "9"), 5, "no position in partition 9"),
        (("--from", "yesterday"), 2, "no place in a topic"),
        (("--from", "2026-11-21T10:00"), 2, "time zone"),
        (("--from", "earliest", "--rate", "0"), 2, "--rate"),
        ((), 2, "--from"),
        (("--from", "1", "--to", "0", "--partition", "0"), 2, "ends before it begins"),
    ):
        assert says in drained.run(*AGAIN, *arguments, code=code).stderr
    assert "Did you mean 'book'" in drained.run("reprocess", APP, "boook", "--from", "earliest", code=5).stderr
    assert "has never run" in drained.run("reprocess", APP, "confirm", "--from", "earliest", code=5).stderr
    assert booked(drained) == 10


def test_a_failure_is_told_by_the_exit_code(drained: Shell) -> None:
    drained.publish(-1, 1)
    drained.run("relay", APP, "--once")
    with drained.database.begin("test") as connection:
        connection.execute(text("DELETE FROM eo.processed_message"))
    for partition in ("0", "1"):
        drained.run("position", "set", drained.consumer, partition, "latest")
    failed = json.loads(drained.run(*AGAIN, "--from", "earliest", "--yes", "--json", code=4).stdout)
    assert (failed["result"]["ran"], failed["result"]["failed"]) == (10, 1)
    assert failed["result"]["failures"][0]["error"] == "ValueError in shop.py:book"
    assert booked(drained) == 20
