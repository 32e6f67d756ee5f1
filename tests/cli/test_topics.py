"""`eo topics`: plan shows, apply does."""

from __future__ import annotations

import json
import uuid

from sqlalchemy import text

from eoframework import provision
from eoframework.topic import Topic
from tests.cli.conftest import APP, Shell


def test_plan_changes_nothing_and_apply_makes_it_so(bare_shell: Shell) -> None:
    planned = json.loads(bare_shell.run("topics", "plan", APP, "--json", code=4).stdout)["differences"]
    assert [difference["action"] for difference in planned] == ["create"] * 3
    assert json.loads(bare_shell.run("topics", "plan", APP, "--json", code=4).stdout)["differences"] == planned
    bare_shell.run("topics", "apply", APP)
    assert json.loads(bare_shell.run("topics", "plan", APP, "--json").stdout) == {"differences": []}
    assert "nothing to do" in bare_shell.run("topics", "apply", APP).stdout


def test_what_was_made(bare_shell: Shell) -> None:
    shell = bare_shell
    shell.run("topics", "apply", APP)
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


def test_three_brokers_keep_three_copies_and_want_two_in_sync() -> None:
    topics = [Topic("orders", dict), Topic("own", dict, replication_factor=2, config={"min.insync.replicas": "1"})]
    wanted = {topic.name: topic for topic in provision.wanted_topics(topics, brokers=3, outbox=(uuid.UUID(int=7), 8))}
    orders, own, checkpoints = wanted["orders"], wanted["own"], wanted[f"eo.relay.{uuid.UUID(int=7)}"]
    safe = {"min.insync.replicas": "2", "unclean.leader.election.enable": "false"}
    assert (orders.replicas, orders.config) == (3, safe)
    assert (own.replicas, own.config) == (2, safe | {"min.insync.replicas": "1"})
    assert (checkpoints.partitions, checkpoints.replicas) == (8, 3)
    assert checkpoints.config == safe | {"cleanup.policy": "compact"}


def test_few_brokers_are_warned_of(bare_shell: Shell) -> None:
    assert "new topics get one replica" in bare_shell.run("topics", "plan", APP, code=4).stderr


def test_more_replicas_than_brokers(bare_shell: Shell) -> None:
    said = bare_shell.run("topics", "apply", "tests.cli.shop:ambitious", code=3).stderr
    assert "shop.ambitious" in said
    assert "Correct Topic(...)" in said


def test_topics_for_dead_letters_are_wanted_like_the_others() -> None:
    wanted = provision.wanted_topics([], brokers=3, outbox=None, dead_letters=["shop.reserve.dlt"])
    assert [(topic.name, topic.partitions, topic.replicas) for topic in wanted] == [("shop.reserve.dlt", None, 3)]
    assert wanted[0].config["min.insync.replicas"] == "2"
