"""A message's whole way, and what operators do, with every process under its own role."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from eoframework.db.position import _TERMINATE
from tests.cli.conftest import Shell
from tests.processes import eventually, read_topic
from tests.roles.conftest import Roles, logged_in

APP = "tests.roles.shop:app"


@pytest.fixture(scope="module")
def suffix() -> str:
    return uuid.uuid4().hex[:10]


@pytest.fixture
def root(superuser: Shell, suffix: str) -> Iterator[Shell]:
    shell = replace(superuser, suffix=suffix)
    yield shell
    for process in shell.processes:
        process.kill()


def orders(*numbers: int) -> str:
    return "".join(f'{{"order_id": {number}}}\n' for number in numbers)


class TestEachUnderItsOwnRole:
    """In the order of a message's way; each test leaves to the next what it did."""

    def test_a_message_goes_its_way(self, root: Shell, roles: Roles) -> None:
        app, relay, suffix = logged_in(root, roles, "app"), logged_in(root, roles, "relay"), root.suffix
        app.run("topics", "apply", APP)
        app.run("publish", APP, f"roles.orders.{suffix}", stdin=orders(1, 2, 3, -4))
        relay.run("relay", APP, "--once")
        app.run("run", APP, "--once")
        relay.run("relay", APP, "--once")
        assert root.scalar("SELECT count(*) FROM booking") == 3
        assert root.scalar("SELECT count(*) FROM eo.outbox_message") == 0
        servers = root.settings.require_bootstrap_servers()
        assert [len(read_topic(servers, f"roles.{name}.{suffix}")) for name in ("booked", "copies")] == [3, 3]
        assert len(read_topic(servers, f"roles-{suffix}.book.dlt")) == 1

    def test_each_role_is_refused_the_others_work(self, root: Shell, roles: Roles) -> None:
        said = logged_in(root, roles, "relay").run("run", APP, "--once", code=3).stderr
        assert f"eo db grants --app {roles.relay} --apply" in said
        said = logged_in(root, roles, "app").run("relay", APP, "--once", code=3).stderr
        assert f"eo db grants --relay {roles.app} --apply" in said
        observer = logged_in(root, roles, "observer")
        observer.run("run", APP, "--once", code=3)
        said = observer.run("position", "set", f"roles-{root.suffix}.book", "0", "earliest", code=1).stderr
        assert "permission denied" in said

    def test_an_observer_observes(self, root: Shell, roles: Roles) -> None:
        observer = logged_in(root, roles, "observer")
        observer.run("db", "check", "--role", "observer")
        assert "at version" not in observer.run("db", "current").stderr
        shown = json.loads(observer.run("position", "show", "--json").stdout)
        assert f"roles-{root.suffix}.book" in str(shown)
        assert json.loads(observer.run("outbox", "stats", "--json").stdout)
        observer.run("topics", "plan", APP)
        assert "Reject" in observer.run("dead", "ls", "--by", "fingerprint").stdout
        assert "permission denied" in observer.run("dead", "ls", code=1).stderr
        owner = logged_in(root, roles, "owner")
        owner.run("db", "grants", "--observer", roles.observer, "--payloads", "--apply")
        assert "Reject" in observer.run("dead", "ls").stdout
        observer.run("dead", "show", str(root.scalar("SELECT min(id) FROM eo.dead_letter")))
        observer.run("outbox", "ls")
        observer.run("external", "ls")
        owner.run("db", "grants", "--observer", roles.observer, "--apply")

    def test_operators_work_as_the_app(self, root: Shell, roles: Roles) -> None:
        app, group = logged_in(root, roles, "app"), f"roles-{root.suffix}.book"
        letter = str(root.scalar("SELECT id FROM eo.dead_letter"))
        app.run("dead", "show", letter)
        app.run("dead", "ls", "--by", "fingerprint")
        # exit 4: it would fail again
        assert "below zero" in app.run("dead", "try", APP, letter, code=4).stdout
        app.run("dead", "replay", APP, letter)
        app.run("run", APP, "--once", "--handler", "book")
        app.run("dead", "discard", str(root.scalar("SELECT max(id) FROM eo.dead_letter")), "--yes")
        app.run("dead", "ls", "--parked")
        app.run("outbox", "ls")
        app.run("outbox", "stats")
        app.run("external", "ls", "--all")
        app.run("reprocess", APP, "book", "--from", "earliest")
        app.run("position", "set", group, "0", "earliest")
        app.run("position", "forget", group)
        assert root.scalar("SELECT count(*) FROM eo.position") == 0

    def test_what_kafka_refused_is_buried_by_the_relay_and_sent_again_by_the_app(
        self, root: Shell, roles: Roles
    ) -> None:
        """The key of a refused row is held, and opened, by roles that could not do the other's part."""
        app, relay, suffix = logged_in(root, roles, "app"), logged_in(root, roles, "relay"), root.suffix
        topic = f"roles.booked.{suffix}"
        root.admin.set_config(topic, {"max.message.bytes": "160"})
        app.run("publish", APP, topic, stdin=orders(77))
        relay.run("relay", APP, "--once", EO_RELAY_AFTER_DEAD="hold")
        assert root.scalar("SELECT count(*) FROM eo.outbox_held") == 1
        root.admin.set_config(topic, {"max.message.bytes": "100000"})
        letter = str(root.scalar("SELECT max(id) FROM eo.dead_letter"))
        app.run("outbox", "show", letter)
        app.run("outbox", "retry", letter)
        relay.run("relay", APP, "--once")
        assert root.scalar("SELECT count(*) FROM eo.outbox_held") == 0
        assert len(read_topic(root.settings.require_bootstrap_servers(), topic)) == 4


def test_a_running_worker_looks_alive_to_other_roles(root: Shell, roles: Roles, tmp_path: Path) -> None:
    """Seen to fail without the coalesce in db/position_admin.py: `(not connected)`, of a worker that was at work."""
    app = logged_in(root, roles, "app")
    app.run("topics", "apply", APP)
    worker = app.start("run", APP, "--handler", "book")
    eventually(lambda: root.scalar("SELECT count(owner) FROM eo.position"), "a worker with a partition", log=worker.log)
    shown = logged_in(root, roles, "observer").run("position", "show").stdout
    assert f":{worker.pid}:" in shown
    assert "not connected" not in shown
    worker.stop()


def test_a_successor_ends_a_frozen_owner_of_the_same_role(root: Shell, roles: Roles) -> None:
    """pg_terminate_backend asks for the same role; with another one the successor waits for the server's timeouts."""
    group = f"frozen-{root.suffix}"
    values: dict[str, object] = {"partition": 0, "topic_id": uuid.uuid4()}
    with root.database.begin("test") as connection:
        values["consumer_id"] = connection.execute(
            text("INSERT INTO eo.consumer (name, topic) VALUES (:group, 't') RETURNING id"), {"group": group}
        ).scalar_one()
        connection.execute(
            text("""INSERT INTO eo.position (consumer_id, topic_id, partition, topic, cluster_id, next_offset)
                    VALUES (:consumer_id, :topic_id, :partition, 't', 'c', 0)"""),
            values,
        )
    statement = root.database.schema.sql(_TERMINATE)
    for owner, terminated in (("app", [(True,)]), ("owner", [])):
        frozen, successor = (logged_in(root, roles, name).settings for name in (owner, "app"))
        outcome = _terminate(root, frozen.require_database_url(), successor.require_database_url(), statement, values)
        assert outcome == terminated, owner


def _terminate(
    root: Shell, frozen_url: str, successor_url: str, statement: str, values: dict[str, object]
) -> list[tuple[object, ...]]:
    """What the successor's statement says while the frozen owner holds the row it is recorded in."""
    frozen, successor = create_engine(frozen_url), create_engine(successor_url)
    with frozen.connect() as owner, successor.connect() as other:
        note = """UPDATE eo.position SET backend_pid = pg_backend_pid(), backend_start = (SELECT backend_start
            FROM pg_stat_activity WHERE pid = pg_backend_pid()) WHERE consumer_id = %(consumer_id)s"""
        owner.exec_driver_sql(note, values)
        owner.commit()
        owner.exec_driver_sql("UPDATE eo.position SET next_offset = 0 WHERE consumer_id = %(consumer_id)s", values)
        found = [tuple(row) for row in other.exec_driver_sql(statement, values)]
        owner.invalidate()
    frozen.dispose()
    successor.dispose()
    return found
