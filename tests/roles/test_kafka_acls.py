"""The rights on Kafka that `eo topics plan --acls` lists: with them everything runs, without any one of them not."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)
from sqlalchemy import text

from eoframework.db.outbox import Outbox
from eoframework.db.session import Database
from eoframework.message import OutboxMessage, new_id
from eoframework.settings import Settings
from tests.cli.conftest import Shell
from tests.cli.test_kafka_rights import LOGIN, USER, Guarded, guarded
from tests.conftest import make_settings
from tests.consume.nursery import Nursery
from tests.processes import eventually, produce, read_topic

__all__ = ["guarded"]

APP = "tests.roles.shop:app"
KINDS = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "transactional-id": ResourceType.TRANSACTIONAL_ID,
    "cluster": ResourceType.BROKER,
}
OPERATIONS = {
    "Read": AclOperation.READ,
    "Write": AclOperation.WRITE,
    "Create": AclOperation.CREATE,
    "Delete": AclOperation.DELETE,
    "Describe": AclOperation.DESCRIBE,
    "DescribeConfigs": AclOperation.DESCRIBE_CONFIGS,
    "AlterConfigs": AclOperation.ALTER_CONFIGS,
}
EVERYTHING = AclBindingFilter(
    ResourceType.ANY, None, ResourcePatternType.ANY, None, None, AclOperation.ANY, AclPermissionType.ANY
)
REFUSED = re.compile(r"AUTHORIZATION_FAILED|[Aa]uthorization failed")
Right = dict[str, Any]


@dataclass
class Rig:
    """An app behind a broker that asks for rights; `open` commands may do everything."""

    guarded: Guarded
    open: Shell
    login: Shell

    def rights(self, process: str) -> list[Right]:
        """Those it cannot do without."""
        found = json.loads(self.open.run("topics", "plan", APP, "--acls", "--json").stdout)["acls"]
        return [right for right in found if right["process"] == process and not right["optional"]]

    def give(self, rights: list[Right]) -> None:
        """These rights and no others."""
        self.guarded.revoke_all()
        admin = AdminClient({"bootstrap.servers": self.guarded.open})
        for future in admin.create_acls([binding(right) for right in rights]).values():
            future.result(10)
        # The controller confirms a right before the broker knows it.
        eventually(lambda: len(admin.describe_acls(EVERYTHING).result(10)) == len(rights), "the rights at the broker")

    def refused(self, *command: str) -> bool:
        """Whether the command says that a right is missing, be it that it ends of it or waits for it."""
        log = self.login.directory / f"{uuid.uuid4().hex}.log"
        process = self.login.nursery.spawn(*command, environment=self.login._environment(), log=log)
        eventually(lambda: REFUSED.search(log.read_text()) or ended(process.pid), f"an end of {command}", log=log)
        process.wait(0)
        return REFUSED.search(log.read_text()) is not None

    def put(self, *topics: str) -> None:
        """An outbox row for each topic."""
        rows = [
            OutboxMessage(id=new_id(), topic=topic, key=b"k", payload=b"{}", type="t", source="s", content_type="c")
            for topic in topics
        ]
        with self.open.database.begin("test") as connection:
            Outbox(self.open.database.schema).insert(connection, rows)


def ended(pid: int) -> bool:
    """Its parent, the nursery, has not asked for it yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def binding(right: Right) -> AclBinding:
    pattern = ResourcePatternType.PREFIXED if right["prefixed"] else ResourcePatternType.LITERAL
    operation = OPERATIONS[right["operation"]]
    return AclBinding(
        KINDS[right["resource"]], right["name"], pattern, f"User:{USER}", "*", operation, AclPermissionType.ALLOW
    )


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


@pytest.fixture
def rig(guarded: Guarded, nursery: Nursery, database: Database, settings: Settings, tmp_path: Path) -> Iterator[Rig]:
    url, suffix = settings.require_database_url(), uuid.uuid4().hex[:10]
    with database.begin("test") as connection:
        connection.execute(text("CREATE TABLE booking (id int, pid int)"))
    opened = Shell(nursery, database, make_settings(url, guarded.open), suffix, tmp_path)
    opened.run("topics", "apply", APP)
    yield Rig(guarded, opened, replace(opened, settings=make_settings(url, guarded.login), extra=LOGIN))
    guarded.revoke_all()


def of(rig: Rig, process: str, *names: str) -> list[Right]:
    """Those rights of the process that are about one of these names."""
    found = [right for right in rig.rights(process) if any(name in right["name"] for name in names)]
    assert found
    return found


def needed(rig: Rig, rights: list[Right], *command: str) -> list[Right]:
    """Those without which the command is refused, each taken away alone."""
    found = []
    for right in rights:
        rig.give([other for other in rights if other is not right])
        if rig.refused(*command):
            found.append(right)
    rig.give(rights)
    return found


def test_a_handler(rig: Rig) -> None:
    suffix = rig.open.suffix
    rights = of(rig, "run", f"roles.orders.{suffix}", f"roles-{suffix}.book")
    orders = [(None, b'{"order_id": %d}' % number) for number in (1, 2, -3)]
    produce(rig.guarded.open, f"roles.orders.{suffix}", orders)
    command = ("run", APP, "--once", "--handler", "book")
    assert [r for r in rights if r not in needed(rig, rights, *command)] == []
    assert not rig.refused(*command)
    assert rig.open.scalar("SELECT count(*) FROM booking") == 2


def test_a_transform(rig: Rig) -> None:
    """Seen to fail with 5 s as _OFFSETS_TIMEOUT in kafka/admin.py: without the group it never said what it lacks."""
    suffix = rig.open.suffix
    rights = of(rig, "run", f"roles.orders.{suffix}", f"roles.copies.{suffix}", f"roles-{suffix}.copy")
    orders = [(None, b'{"order_id": %d}' % number) for number in (1, 2, -3)]
    produce(rig.guarded.open, f"roles.orders.{suffix}", orders)
    command = ("run", APP, "--once", "--handler", "copy")
    assert [r for r in rights if r not in needed(rig, rights, *command)] == []
    assert not rig.refused(*command)
    assert len(read_topic(rig.guarded.open, f"roles.copies.{suffix}")) == 2
    assert len(read_topic(rig.guarded.open, f"roles-{suffix}.copy.dlt")) == 1


def test_the_relay(rig: Rig) -> None:
    """Seen to fail with GROUP_AUTHORIZATION_FAILED not in kafka/checkpoint.py: it stopped at its start,
    for want of a right on a group that it never joins.
    """
    rights = rig.rights("relay")
    topics = [r["name"] for r in rights if r["resource"] == "topic" and not r["name"].startswith("eo.relay.")]
    assert len(topics) == 3
    # Without any checkpoint there is nothing to be read.
    rig.put(*topics)
    rig.open.run("relay", APP, "--once")
    useless = []
    for right in rights:
        # Afresh each time: whatever may be sent is.
        rig.put(*topics)
        useless += [] if right in needed_one(rig, rights, right) else [right]
    assert useless == []
    assert not rig.refused("relay", APP, "--once")
    assert rig.open.scalar("SELECT count(*) FROM eo.outbox_message") == 0
    assert [len(read_topic(rig.guarded.open, topic)) for topic in topics] == [len(rights) + 1] * 3


def needed_one(rig: Rig, rights: list[Right], right: Right) -> list[Right]:
    rig.give([other for other in rights if other is not right])
    found = [right] if rig.refused("relay", APP, "--once") else []
    rig.give(rights)
    return found


def test_observers_and_operators(rig: Rig) -> None:
    """Suffices; what can be left out is a matter of which commands they are to use."""
    login, group = rig.login, f"roles-{rig.open.suffix}.book"
    rig.open.run("run", APP, "--once")
    rig.give(rig.rights("observer"))
    login.run("topics", "plan", APP)
    login.run("position", "show")
    assert rig.refused("position", "set", group, "0", "earliest")
    rig.give(rig.rights("operator"))
    login.run("topics", "apply", APP)
    login.run("position", "set", group, "0", "earliest")
    login.run("reprocess", APP, "book", "--from", "earliest", "--yes")
    login.run("position", "forget", group)
    topics = {right["name"] for right in rig.rights("relay") if right["resource"] == "topic"}
    topics = {name for name in topics if not name.startswith("eo.relay.")}
    rig.put(*topics)
    rig.open.run("relay", APP, "--once")
    # As after a restore: Kafka knows of a batch that the database does not.
    with rig.open.database.begin("test") as connection:
        connection.execute(text("UPDATE eo.relay_shard SET batch_no = 0"))
    rig.put(*topics)
    login.run("outbox", "adopt")
    assert not rig.refused("outbox", "adopt")


def test_as_a_table_and_as_commands(rig: Rig) -> None:
    said = rig.open.run("topics", "plan", APP, "--acls").stdout
    suffix = rig.open.suffix
    assert re.search(
        rf"^run +Read +group +roles-{suffix}\.book +roles-{suffix}\.book is its consumer group$", said, re.M
    )
    assert (
        f"kafka-acls --add --allow-principal User:roles-{suffix}-run --operation Write --transactional-id "
        f"eo.transform.roles-{suffix}.copy. --resource-pattern-type prefixed"
    ) in said
