"""`eo topics`: plan shows, apply does."""

from __future__ import annotations

import json

from sqlalchemy import text

from tests.cli.conftest import APP, Shell


def test_plan_changes_nothing_and_apply_makes_it_so(bare_shell: Shell) -> None:
    planned = json.loads(bare_shell.run("topics", "plan", APP, "--json", code=4).stdout)["differences"]
    assert [difference["action"] for difference in planned] == ["create"] * 3
    assert json.loads(bare_shell.run("topics", "plan", APP, "--json", code=4).stdout)["differences"] == planned
    bare_shell.run("topics", "apply", APP)
    assert json.loads(bare_shell.run("topics", "plan", APP, "--json").stdout) == {"differences": []}
    assert "nothing to do" in bare_shell.run("topics", "apply", APP).stdout


def test_what_was_made(shell: Shell) -> None:
    with shell.database.engine.connect() as connection:
        outbox_id = connection.scalar(text("SELECT id FROM eo.outbox"))
    orders = shell.admin.describe(shell.orders)
    assert (orders.partitions, orders.own_config["unclean.leader.election.enable"]) == (2, "false")
    assert shell.admin.describe(f"shop.booked.{shell.suffix}").own_config["retention.ms"] == "3600000"
    checkpoints = shell.admin.describe(f"eo.relay.{outbox_id}")
    assert (checkpoints.partitions, checkpoints.config["cleanup.policy"]) == (4, "compact")


def test_a_setting_is_corrected_and_partitions_are_left_to_a_person(bare_shell: Shell) -> None:
    bare_shell.admin.create(bare_shell.orders, partitions=1, replicas=1, config={})
    booked = f"shop.booked.{bare_shell.suffix}"
    bare_shell.admin.create(booked, partitions=1, replicas=1, config={"retention.ms": "1000"})
    done = bare_shell.run("topics", "apply", APP, code=4)
    assert f"! {bare_shell.orders}: partitions 1 -> 2" in done.stdout
    assert f"~ {booked}: retention.ms 1000 -> 3600000" in done.stdout
    assert bare_shell.admin.describe(booked).config["retention.ms"] == "3600000"
    assert bare_shell.admin.describe(bare_shell.orders).partitions == 1
