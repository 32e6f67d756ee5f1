"""`eo position` for transforms, whose truth is in Kafka: shown, set, forgotten, and the remedies that errors name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, IsolationLevel, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from eoframework.db import audit
from eoframework.db.transform_desk import TransformDesk
from eoframework.transform.mark import Mark
from tests.cli.conftest import Shell
from tests.processes import Eo, eventually, produce, read_topic

APP = "tests.cli.press:app"
ALL_OF_THEM = [*range(10)] * 2


class Killed(Exception):
    """As if the process ended here."""


class Press:
    """Ten orders in each of two partitions, and the transform that copies them."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.servers = shell.settings.require_bootstrap_servers()
        self.client = AdminClient({"bootstrap.servers": self.servers})
        self.group = f"press-{shell.suffix}.press"
        self.pressed = f"shop.pressed.{shell.suffix}"
        shell.admin.create(self.pressed, partitions=1, replicas=1, config={})
        for name in ("press", "squeeze"):
            shell.admin.create(f"press-{shell.suffix}.{name}.dlt", partitions=1, replicas=1, config={})
        self.send(range(10))

    def send(self, numbers: Any) -> None:
        for partition in (0, 1):
            lines = [(b"k", b'{"order_id": %d}' % number) for number in numbers]
            produce(self.servers, self.shell.orders, lines, partition=partition)

    # --- as a user would ---

    def run(self, *, code: int = 0, app: str = APP, name: str = "press") -> str:
        return self.shell.run("run", app, "--once", "--handler", name, code=code).stderr

    @contextmanager
    def running(self) -> Iterator[Eo]:
        process = self.shell.start("run", APP, "--handler", "press")
        self.send([100])
        eventually(lambda: self.out().count(100) == 2, "it runs", log=process.log)
        yield process
        assert process.stop() == 0

    def position(self, command: str, *arguments: str, code: int = 0) -> Any:
        done = self.shell.run("position", command, self.group, *arguments, "--json", code=code)
        return json.loads(done.stdout) if code == 0 else done.stderr

    def offsets(self) -> list[int | None]:
        return [line["next_offset"] for line in self.position("show")]

    def begun(self) -> list[bool]:
        return [line["begun"] for line in self.position("show")]

    def remedy_by_kafkas_tool(self, *offsets: int) -> None:
        """What kafka-consumer-groups --reset-offsets does."""
        wanted = [TopicPartition(self.shell.orders, partition, offset) for partition, offset in enumerate(offsets)]
        asked = [ConsumerGroupTopicPartitions(self.group, wanted)]
        self.client.alter_consumer_group_offsets(asked)[self.group].result(20)

    # --- what came of it ---

    def out(self) -> list[int]:
        """What was sent, by any run, in the order of the topic."""
        # A commit is confirmed before its markers are in the topics: without them a reader sees its end too early.
        eventually(lambda: self._end(stable=True) == self._end(stable=False), "the last transaction to be seen")
        return [json.loads(message.value() or b"")["order_id"] for message in read_topic(self.servers, self.pressed)]

    def _end(self, *, stable: bool) -> int:
        level = IsolationLevel.READ_COMMITTED if stable else IsolationLevel.READ_UNCOMMITTED
        where = TopicPartition(self.pressed, 0)
        return int(
            self.client.list_offsets({where: OffsetSpec.latest()}, isolation_level=level)[where].result(10).offset
        )

    def audited(self) -> audit.AuditEntry | None:
        database = self.shell.database
        with database.begin("test") as connection:
            subject = f"consumer/{self.group}"
            return audit.last(connection, database.schema, [subject]).get(subject)

    def execute(self, statement: str) -> None:
        with self.shell.database.begin("test") as connection:
            connection.exec_driver_sql(statement)


@pytest.fixture
def press(shell: Shell) -> Press:
    """It has run once; nobody runs."""
    made = Press(shell)
    made.run()
    assert sorted(made.out()) == sorted(ALL_OF_THEM)
    return made


def lost(press: Press) -> None:
    assert press.shell.admin.delete_group(press.group)
    assert press.offsets() == [None, None]
    assert "its offset is lost" in press.shell.run("position", "show", press.group).stdout
    said = press.run(code=70)
    assert "has no offsets any more" in said
    assert f"eo position set {press.group} PARTITION OFFSET (or kafka-consumer-groups --reset-offsets)" in said
    assert f"eo position forget {press.group}" in said


# --- show ---


def test_show_tells_both_kinds_and_what_is_known_of_the_message(press: Press) -> None:
    shell = press.shell
    mark = Mark(attempts=2, crashes=1, deaths=3)
    assert shell.admin.set_group_offset(press.group, shell.orders, 1, 7, mark=mark.encode())
    shell.run("run", APP, "--once", "--handler", "book")
    lines = json.loads(shell.run("position", "show", "--json").stdout)
    assert [(line["kind"], line["partition"], line["next_offset"]) for line in lines] == [
        *(("handler", 0, 10), ("handler", 1, 10)),
        *(("transform", 0, 10), ("transform", 1, 7)),
    ]
    assert lines[3]["mark"] == {"attempts": 2, "crashes": 1, "takeovers": 0, "deaths": 3}
    assert (lines[3]["start_offset"], lines[3]["begun"]) == (0, True)
    first, second = shell.run("position", "show", press.group).stdout.splitlines()
    assert first == f"transform {press.group} {shell.orders}[0] next 10 began at 0"
    assert second == f"transform {press.group} {shell.orders}[1] next 7 began at 0 attempts 2 crashes 1 deaths 3"
    assert "Did you mean" in shell.run("position", "show", press.group + "s", code=5).stderr


def test_handlers_are_shown_without_kafka(press: Press) -> None:
    """Seen to fail with Kafka asked whatever there is: 69."""
    press.shell.run("run", APP, "--once", "--handler", "book")
    elsewhere = {"EO_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    handler = f"press-{press.shell.suffix}.book"
    assert handler in press.shell.run("position", "show", handler, "--no-wait", **elsewhere).stdout
    press.shell.run("position", "show", press.group, "--no-wait", code=69, **elsewhere)


# --- set ---


def test_set_moves_a_stopped_transform_with_fresh_counts_and_an_audit_row(press: Press) -> None:
    """Seen to fail without the mark in set_group_offset: the offset looked like one that another tool had set."""
    stale = Mark(attempts=5).encode()
    assert press.shell.admin.set_group_offset(press.group, press.shell.orders, 0, 10, mark=stale)
    moved = press.position("set", "0", "7")
    assert (moved["kind"], moved["was"], moved["next_offset"]) == ("transform", 10, 7)
    assert press.shell.admin.group_offsets(press.group, press.shell.orders)[0] == (7, Mark().encode())
    entry = press.audited()
    assert entry is not None
    assert entry.action == "position.set"
    assert (entry.detail["partition"], entry.detail["from_offset"], entry.detail["to_offset"]) == (0, 10, 7)
    assert entry.detail["mark"] == stale
    assert "set by hand from 7 to 10" in press.shell.run("position", "set", press.group, "0", "latest").stderr
    press.position("set", "0", "7")
    press.run()
    assert press.out()[20:] == [7, 8, 9]
    press.position("set", "1", "earliest")
    press.run()
    assert press.out()[23:] == [*range(10)]


@pytest.mark.parametrize("protocol", ["consumer", "classic"])
def test_set_is_refused_while_it_runs(press: Press, protocol: str) -> None:
    """Seen to fail with the answer of set_group_offset ignored: told as done, with an audit row, and nothing moved."""
    press.shell.extra["EO_GROUP_PROTOCOL"] = protocol
    with press.running():
        said = press.position("set", "0", "3", code=70)
        assert "is running" in said
        assert "Stop its workers first" in said
        assert press.audited() is None
    press.run()
    assert press.offsets() == [11, 11]
    assert len(press.out()) == 22


def test_what_cannot_be_set(press: Press) -> None:
    for arguments, code, says in (
        (("0", "11"), 5, "has offsets 0 to 10, not 11"),
        (("7", "0"), 5, "has no position in partition 7"),
        (("0", "soon"), 3, "earliest or latest"),
    ):
        assert says in press.position("set", *arguments, code=code)
    press.execute("UPDATE eo.transform_start SET cluster_id = 'elsewhere'")
    assert "stored for Kafka cluster elsewhere" in press.position("set", "0", "0", code=70)
    assert press.offsets() == [10, 10]
    assert press.audited() is None


def test_a_partition_that_was_set_has_begun(press: Press) -> None:
    """Seen to fail without `_BEGUN` in the desk: it was still taken for one that had never begun."""
    press.shell.admin.delete_group(press.group)
    press.execute("UPDATE eo.transform_start SET begun = false")
    press.position("set", "1", "4")
    assert press.begun() == [False, True]
    press.shell.admin.delete_group(press.group)
    assert "partitions 1:" in press.run(code=70)


def test_a_crash_in_the_middle_of_setting_leaves_an_offset_that_counts(press: Press) -> None:
    """Seen to fail with the row marked in a transaction of its own before: noted as begun, without an offset."""
    press.shell.admin.delete_group(press.group)
    press.execute("UPDATE eo.transform_start SET begun = false, start_offset = 10")
    desk = TransformDesk(press.shell.database)
    line = desk.lines(press.group)[0]

    def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        desk.move(line, actor="test", detail={}, in_kafka=die)
    assert (press.offsets(), press.begun()) == ([None, None], [False, False])

    def set_and_die() -> None:
        assert press.shell.admin.set_group_offset(press.group, press.shell.orders, 0, 8, mark=Mark().encode())
        raise Killed

    with pytest.raises(Killed):
        desk.move(line, actor="test", detail={}, in_kafka=set_and_die)
    assert (press.offsets(), press.begun()) == ([8, None], [False, False])
    press.run()
    assert press.out()[20:] == [8, 9]
    assert press.begun() == [True, True]


def test_a_transaction_under_way_is_not_overtaken(press: Press) -> None:
    """A frozen worker out of its group, whose transaction is still open, may wake and commit.

    Seen to fail without `_refuse_unsettled`: the offset was set. The commit that came later did not move it again, so
    what that transaction had sent was there, and was to be sent a second time.
    """
    producer = Producer({"bootstrap.servers": press.servers, "transactional.id": f"frozen-{press.group}"})
    stranger = Consumer({"bootstrap.servers": press.servers, "group.id": press.group})
    producer.init_transactions(20)
    producer.begin_transaction()
    at = [TopicPartition(press.shell.orders, 0, 9)]
    producer.send_offsets_to_transaction(at, stranger.consumer_group_metadata(), 20)
    for command in (("set", "0", "5"), ("forget",)):
        assert "a Kafka transaction under way" in press.position(*command, code=70)
    assert press.offsets() == [10, 10]
    producer.commit_transaction(20)
    stranger.close()
    assert press.offsets() == [9, 10]
    press.position("set", "0", "5")
    assert press.offsets() == [5, 10]


# --- forget ---


def test_forget_is_refused_while_it_runs_and_makes_a_first_start(press: Press) -> None:
    """Seen to fail with the answer of delete_group ignored: the running worker's rows were gone."""
    with press.running():
        assert "is running" in press.position("forget", code=70)
        assert press.begun() == [True, True]
        assert press.audited() is None
    assert press.position("forget")["forgotten"] == 2
    entry = press.audited()
    assert entry is not None
    assert entry.action == "position.forget"
    assert press.group not in press.shell.run("position", "show").stdout
    press.position("forget", code=5)
    assert press.shell.admin.group_offsets(press.group, press.shell.orders) == {}
    press.run()
    assert press.out()[22:].count(100) == 2
    assert len(press.out()) == 44


def test_a_crash_in_the_middle_of_forgetting_fails_closed(press: Press) -> None:
    """Seen to fail with the rows deleted in a transaction of their own before: it began anew, half forgotten."""

    def delete_and_die() -> None:
        assert press.shell.admin.delete_group(press.group)
        raise Killed

    with pytest.raises(Killed):
        TransformDesk(press.shell.database).forget(press.group, actor="test", in_kafka=delete_and_die)
    assert press.audited() is None
    assert "has no offsets any more" in press.run(code=70)
    assert press.position("forget")["forgotten"] == 2
    press.run()
    assert len(press.out()) == 40


# --- remedies that errors name ---


def test_lost_offsets_set_with_kafkas_own_tool(press: Press) -> None:
    lost(press)
    press.remedy_by_kafkas_tool(10, 8)
    press.run()
    assert press.out()[20:] == [8, 9]


def test_lost_offsets_set_with_ours(press: Press) -> None:
    lost(press)
    press.position("set", "0", "10")
    assert "partitions 1:" in press.run(code=70)
    press.position("set", "1", "8")
    press.run()
    assert press.out()[20:] == [8, 9]


def test_lost_offsets_forgotten(press: Press) -> None:
    lost(press)
    press.position("forget")
    press.run()
    assert len(press.out()) == 40


def test_a_topic_made_anew(press: Press) -> None:
    press.client.delete_topics([press.shell.orders])[press.shell.orders].result(20)
    gone = lambda: press.shell.orders not in press.client.list_topics(timeout=10).topics  # noqa: E731
    eventually(gone, "the topic is gone")
    assert press.offsets() == [None, None]
    press.shell.admin.create(press.shell.orders, partitions=2, replicas=1, config={})
    press.send([200])
    said = press.run(code=70)
    assert "deleted and re-created" in said
    assert f"eo position forget {press.group}" in said
    assert "deleted and re-created" in press.position("set", "0", "0", code=70)
    press.position("forget")
    press.run()
    assert press.out()[20:] == [200, 200]


def test_another_cluster(press: Press) -> None:
    press.execute("UPDATE eo.transform_start SET cluster_id = 'elsewhere'")
    said = press.run(code=70)
    assert "stored for Kafka cluster elsewhere" in said
    assert f"eo position forget {press.group}" in said
    press.position("forget")
    press.remedy_by_kafkas_tool(10, 9)
    press.run()
    assert press.out()[20:] == [9]
    assert press.offsets() == [10, 10]


def test_records_deleted_before_they_were_transformed(press: Press) -> None:
    press.send([200, 201, 202])
    where = TopicPartition(press.shell.orders, 1, 12)
    press.client.delete_records([where])[where].result(20)
    said = press.run(code=70)
    assert "outside the log" in said
    assert f"eo position set {press.group} 1 earliest" in said
    press.position("set", "1", "earliest")
    press.run()
    assert sorted(press.out()[20:]) == [200, 201, 202, 202]


# --- beside handlers ---


def test_neither_takes_the_other_for_a_renamed_consumer(shell: Shell) -> None:
    """Seen to fail with only the handlers in App.groups: the handler refused to start beside the transform."""
    press = Press(shell)
    press.run()
    press.run(name="book")
    press.run()
    shell.run("run", APP, "--once")
    assert len(press.out()) == 20
    assert shell.scalar("SELECT count(*) FROM booking") == 20


def test_a_renamed_transform_is_refused_and_the_remedy_works(press: Press) -> None:
    said = press.run(code=3, app="tests.cli.press:renamed", name="squeeze")
    assert f"eo position forget {press.group}" in said
    press.position("forget")
    press.run(app="tests.cli.press:renamed", name="squeeze")
    assert len(press.out()) == 40


def test_a_transform_turned_into_a_handler_is_both_until_one_is_forgotten(press: Press) -> None:
    """Seen to fail with the group deleted for `--kind handler`: the transform's offsets were lost."""
    shell = press.shell
    shell.run("run", "tests.cli.press:turned", "--once", "--adopt-offsets")
    assert shell.scalar("SELECT count(*) FROM booking") == 0
    assert [line["kind"] for line in press.position("show")] == ["handler"] * 2 + ["transform"] * 2
    assert "--kind handler, or --kind transform" in press.position("set", "0", "0", code=70)
    assert "--kind handler, or --kind transform" in press.position("forget", code=70)
    press.position("forget", "--kind", "nonsense", code=3)
    assert press.position("forget", "--kind", "handler")["forgotten"] == 2
    press.position("forget", "--kind", "handler", code=5)
    assert press.offsets() == [10, 10]
    assert shell.scalar("SELECT count(*) FROM eo.consumer WHERE topic = ''") == 0
    press.run()
    assert len(press.out()) == 20
    assert press.position("forget")["forgotten"] == 2
    assert shell.scalar("SELECT count(*) FROM eo.consumer WHERE topic = ''") == 1


def test_the_transform_of_both_can_go(press: Press) -> None:
    shell = press.shell
    shell.run("run", "tests.cli.press:turned", "--once", "--adopt-offsets")
    assert press.position("forget", "--kind", "transform")["forgotten"] == 2
    assert [line["kind"] for line in press.position("show")] == ["handler"] * 2
    assert shell.scalar("SELECT count(*) FROM eo.consumer WHERE topic = ''") == 0
    press.send([100])
    shell.run("run", "tests.cli.press:turned", "--once")
    assert shell.scalar("SELECT count(*) FROM booking") == 2


# --- dead letters ---


def test_dead_says_where_those_of_transforms_are(press: Press) -> None:
    """Seen to fail without the question in dead.py: an empty list, which looks like good news."""
    shell = press.shell
    for arguments in (("ls",), ("ls", "--parked"), ("ls", "--by", "fingerprint"), ("discard", "--all", "--yes")):
        said = shell.run("dead", *arguments, "--handler", press.group, code=5).stderr
        assert f"{press.group}.dlt" in said
    assert "none" in shell.run("dead", "ls").stdout
    assert "<app>.<name>.dlt" in shell.run("dead", "ls", "--help").stdout
    shell.run("run", "tests.cli.press:turned", "--once", "--adopt-offsets")
    assert "none" in shell.run("dead", "ls", "--handler", press.group).stdout
