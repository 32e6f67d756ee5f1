"""Stop rather than guess: every way in which Kafka and the database can contradict each other, and its remedy.

And what must not stop: everything that only looks like a contradiction.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from confluent_kafka import Consumer, ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Message, Topic, Tx
from eoframework.db.session import Database
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.conftest import make_settings
from tests.consume.harness import column, make_app, make_ledger, next_offsets, run_once, running
from tests.processes import eo_process, eventually, settings_environment

INSERT = text('INSERT INTO ledger (partition, "offset", note) VALUES (:p, :o, :n)')
PROTOCOLS = ["consumer", "classic"]


class Entry(BaseModel):
    n: int


class Place:
    """One handler on one topic with one partition, and the hands that meddle with it."""

    def __init__(self, settings: Settings, database: Database, topic: str, log: pytest.LogCaptureFixture) -> None:
        self.settings = settings
        self.database = database
        self.topic = topic
        # A name of its own: groups are the broker's, which tests share.
        self.name = f"app{uuid.uuid4().hex[:8]}"
        self.group = f"{self.name}.book"
        self.client = AdminClient({"bootstrap.servers": settings.require_bootstrap_servers()})
        self._log = log
        self.handling: Callable[[int], None] = lambda _: None

    def app(self, **settings: object) -> App:
        """A new App, as a new process would make it."""
        url, servers = self.settings.require_database_url(), self.settings.require_bootstrap_servers()
        app = make_app(make_settings(url, servers, max_wait=0.1, **settings), self.database, self.name)

        @app.handler(Topic(self.topic, Entry), name="book")
        def book(message: Message[Entry], tx: Tx) -> None:
            self.handling(message.payload.n)
            tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(message.payload.n)})

        return app

    def send(self, *numbers: int) -> None:
        # A message a batch, so that a fetch can end after each.
        producer = Producer({"bootstrap.servers": self.settings.require_bootstrap_servers(), "batch.num.messages": 1})
        for n in numbers:
            producer.produce(self.topic, value=b'{"n": %d}' % n, partition=0)
        assert producer.flush(30) == 0

    def process(self, *numbers: int) -> None:
        """Send these and process everything there is."""
        self.send(*numbers)
        assert run_once(self.app()) == 0, self._log.text

    def booked(self) -> list[int]:
        return [int(note) for note in column(self.database.engine, "SELECT note FROM ledger ORDER BY id")]

    def refused(self, **settings: object) -> str:
        """A start that must stop with 70 and change nothing; returns what it said."""
        before = self.state()
        self._log.clear()
        assert run_once(self.app(**settings)) == 70, self._log.text
        assert self.state() == before
        return self.said()

    def state(self) -> tuple[object, ...]:
        return self.booked(), next_offsets(self.database), Admin(self.settings).group_offsets(self.group, self.topic)

    def said(self) -> str:
        """The error that stopped it."""
        found = [record for record in self._log.records if record.levelname == "ERROR"]
        errors = [record.getMessage() for record in found if record.name == "eoframework.lifecycle"]
        assert len(errors) == 1, self._log.text
        return errors[0]

    def follow(self, remedy: str, said: str, tmp_path: Path) -> None:
        """Run the command as the message spells it."""
        assert remedy in said
        self.run_eo(remedy, tmp_path)

    def run_eo(self, command: str, tmp_path: Path) -> None:
        arguments = command.removeprefix("eo ").split()
        with eo_process(*arguments, environment=settings_environment(self.settings), log=tmp_path / "eo.log") as eo:
            assert eo.wait() == 0, eo.output()

    def delete_records(self, before: int) -> None:
        where = TopicPartition(self.topic, 0, before)
        self.client.delete_records([where])[where].result(30)

    def recreate_topic(self) -> None:
        admin = Admin(self.settings)
        self.client.delete_topics([self.topic])[self.topic].result(30)
        eventually(lambda: not admin.existing([self.topic]), "the topic is gone")
        admin.create(self.topic, partitions=1, replicas=1, config={})

    def move_group(self, offset: int) -> None:
        """As the usual tools do it: without a mark."""
        where = ConsumerGroupTopicPartitions(self.group, [TopicPartition(self.topic, 0, offset)])
        self.client.alter_consumer_group_offsets([where])[self.group].result(30)

    def execute(self, statement: str) -> None:
        with self.database.engine.begin() as connection:
            connection.execute(text(statement))


@pytest.fixture
def place(settings: Settings, database: Database, topic_name: str, caplog: pytest.LogCaptureFixture) -> Place:
    make_ledger(database.engine)
    return Place(settings, database, topic_name, caplog)


# --- the log is not where we stand ---


def test_records_deleted_past_the_position_while_stopped(place: Place, tmp_path: Path) -> None:
    """Seen to fail with `_check_range` taken out of Ownership._claim and `_AUTO_OFFSET_RESET` out of
    `_LOG_IS_NOT_WHAT_IT_WAS` in kafka/consumer.py: the client never gets going at an offset that is gone (exit 75).
    """
    place.process(0, 1, 2)
    place.send(*range(3, 10))
    place.delete_records(before=6)
    said = place.refused()
    place.follow(f"eo position set {place.group} 0 earliest", said, tmp_path)
    place.process()
    assert place.booked() == [0, 1, 2, 6, 7, 8, 9]


def test_records_deleted_past_the_position_while_running(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Seen to fail with `_AUTO_OFFSET_RESET` out of `_LOG_IS_NOT_WHAT_IT_WAS`: silent for ever."""
    place.send(*range(40))
    reached, deleted = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        reached.set()
        assert deleted.wait(30)

    place.handling = hold
    # Fetched in small pieces, so that the client has not read ahead past what is deleted.
    app = place.app(kafka={"fetch.message.max.bytes": "100", "queued.min.messages": "1"}, max_batch=1)
    with running(app) as run:
        assert reached.wait(30)
        place.delete_records(before=39)
        deleted.set()
        assert run.wait() == 70, caplog.text
    booked = place.booked()
    assert booked == list(range(len(booked)))
    assert next_offsets(place.database) == [(0, len(booked))]
    assert f"eo position set {place.group} 0 earliest" in place.said()


def test_position_above_the_end_of_the_log(place: Place, tmp_path: Path) -> None:
    """As after the topic was restored to an older state. Seen to fail with `_check_range` taken out of
    Ownership._claim and `_AUTO_OFFSET_RESET` out of `_LOG_IS_NOT_WHAT_IT_WAS`: exit 75, to be started again for ever,
    and none the wiser.
    """
    place.process(0, 1, 2)
    place.execute("UPDATE eo.position SET next_offset = 50")
    said = place.refused()
    place.follow(f"eo position set {place.group} 0 earliest", said, tmp_path)
    place.process()
    assert place.booked() == [0, 1, 2, 0, 1, 2], "without ids, an operator's replay is one"


# --- the topic is not the one it was ---


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_topic_recreated_while_stopped(place: Place, protocol: str, tmp_path: Path) -> None:
    """Seen to fail with the topic id check taken out of refuse_moved in identity.py: begins anew, untold."""
    place.process(0, 1, 2)
    place.recreate_topic()
    place.send(*range(10, 15))
    said = place.refused(group_protocol=protocol)
    place.follow(f"eo position forget {place.group}", said, tmp_path)
    place.process()
    assert place.booked() == [0, 1, 2, *range(10, 15)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_topic_recreated_while_running(
    place: Place, protocol: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both protocols read the new topic on from the old offset, the one of KIP-848 until its next heartbeat. Seen to
    fail with the comparison taken out of Ownership._same_topic: the new topic's first three messages are skipped, 13
    and 14 booked, and the worker goes on. And with `self._before_commit()` taken out of the executor: 13 and 14 are
    booked before the worker stops, and would be booked again after the remedy.
    """
    # It looks again only when the new topic has grown past the position.
    with running(place.app(group_protocol=protocol, kafka={"fetch.error.backoff.ms": "700"})) as run:
        place.send(0, 1, 2)
        eventually(lambda: len(place.booked()) == 3, "the first three")
        place.recreate_topic()
        place.send(*range(10, 15))
        assert run.wait() == 70, caplog.text
    said = place.said()
    assert next_offsets(place.database)[0] == (0, 3)
    place.follow(f"eo position forget {place.group}", said, tmp_path)
    assert run_once(place.app(group_protocol=protocol)) == 0
    assert place.booked() == [0, 1, 2, *range(10, 15)]


def test_topic_recreated_and_found_empty(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """The classic protocol then reports an offset out of range, whose remedy would be the wrong one. Seen to fail with
    `_check_topic` taken out of ConsumeWorker._fetch.
    """
    with running(place.app(group_protocol="classic")) as run:
        place.send(0, 1, 2)
        eventually(lambda: len(place.booked()) == 3, "the first three")
        place.recreate_topic()
        assert run.wait() == 70, caplog.text
    assert f"eo position forget {place.group}" in place.said()


def test_topic_deleted_while_running(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Seen to fail with `deleted_topic` taken out of ask_same_topic: exit 3, as for a topic never made."""
    with running(place.app()) as run:
        place.send(0, 1, 2)
        eventually(lambda: len(place.booked()) == 3, "the first three")
        place.client.delete_topics([place.topic])[place.topic].result(30)
        assert run.wait() == 70, caplog.text
    assert next_offsets(place.database) == [(0, 3)]
    assert f"eo position forget {place.group}" in place.said()


# --- the cluster, the database ---


def test_another_cluster(place: Place, tmp_path: Path) -> None:
    """Seen to fail with the cluster check taken out of refuse_moved: goes on, at offsets that mean nothing there."""
    place.process(0, 1, 2)
    place.execute("UPDATE eo.position SET cluster_id = 'the-old-one'")
    place.send(3)
    said = place.refused()
    place.follow(f"eo position forget {place.group}", said, tmp_path)
    place.process()
    assert place.booked() == [0, 1, 2, 0, 1, 2, 3]


def test_empty_database_beside_a_group_with_offsets(place: Place) -> None:
    """Seen to fail with the FailClosed taken out of Start._first_offsets: all of it is processed a second time."""
    place.process(0, 1, 2)
    place.execute("TRUNCATE eo.position, eo.processed_message, eo.consumer CASCADE")
    place.send(3, 4)
    assert "eo run --adopt-offsets" in place.refused()
    assert run_once(place.app(), adopt_offsets=True) == 0
    assert place.booked() == [0, 1, 2, 3, 4]


def test_adopted_offsets_bear_our_mark_before_anything_is_processed(place: Place) -> None:
    """A worker that dies after its first batch and before its first offset commit must not make the adopted offset,
    left behind and without our mark, look like somebody's hand. Seen to fail with `self._mark(claim)` taken out of
    Ownership._claim, and the first, unawaited commit out of ConsumeWorker._claim_waiting, which mostly comes in time.
    """
    place.send(0, 1, 2, 3)
    plain = Consumer({"bootstrap.servers": place.settings.require_bootstrap_servers(), "group.id": place.group})
    plain.commit(offsets=[TopicPartition(place.topic, 0, 2)], asynchronous=False)
    plain.close()
    admin = Admin(place.settings)
    found: list[tuple[int, str]] = []
    place.handling = lambda _: found.append(admin.group_offsets(place.group, place.topic)[0])
    assert run_once(place.app(), adopt_offsets=True) == 0
    assert place.booked() == [2, 3]
    assert found[0] == (2, "eo:1")


@pytest.mark.parametrize("choice", ["redo", "leave out"])
def test_database_restored_to_an_older_state(place: Place, choice: str, tmp_path: Path) -> None:
    """Seen to fail with the second FailClosed taken out of refuse_moved_offset: done again without a word, although
    what was published then has left long ago. The second start shows that the first has not worn the evidence down:
    it fails with refuse_moved_offset called after the transaction of Ownership._take.
    """
    place.process(0, 1, 2)
    place.execute("CREATE TABLE backup AS TABLE eo.position")
    place.process(3, 4)
    place.execute("UPDATE eo.position p SET next_offset = b.next_offset, epoch = b.epoch FROM backup b")
    place.execute('DELETE FROM ledger WHERE "offset" >= 3')
    place.send(5)
    assert place.refused() == place.refused()
    said = place.refused()
    place.follow(f"eo position set {place.group} 0 {3 if choice == 'redo' else 5}", said, tmp_path)
    place.process()
    assert place.booked() == ([0, 1, 2, 3, 4, 5] if choice == "redo" else [0, 1, 2, 5])


def test_database_set_back_under_a_running_worker(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """A failover to a standby that lagged, with the same epoch. Seen to fail with `set_back` taken out of
    Ownership._renew: the lost batch is done again without a word.
    """
    with running(place.app()) as run:
        place.send(0, 1, 2)
        eventually(lambda: place.booked() == [0, 1, 2], "the first three")
        place.execute("UPDATE eo.position SET next_offset = 1")
        place.execute("SELECT pg_terminate_backend(backend_pid) FROM eo.position WHERE backend_pid <> pg_backend_pid()")
        assert run.wait() == 70, caplog.text
    assert f"eo position set {place.group} 0 1" in place.said()


# --- somebody's hand ---


@pytest.mark.parametrize("offset", [1, 5])
def test_group_offsets_moved_by_hand(place: Place, offset: int, tmp_path: Path) -> None:
    """Backward and forward. Seen to fail with the first FailClosed taken out of refuse_moved_offset: what the hand
    wanted is ignored in silence.
    """
    place.process(0, 1, 2)
    place.send(3, 4, 5, 6)
    place.move_group(offset)
    said = place.refused()
    assert f"eo position set {place.group} 0 3" in said
    place.follow(f"eo position set {place.group} 0 {offset}", said, tmp_path)
    place.process()
    assert place.booked() == [0, 1, 2, *range(offset, 7)]


def test_group_offsets_moved_by_hand_and_not_followed(place: Place, tmp_path: Path) -> None:
    place.process(0, 1, 2)
    place.move_group(1)
    place.follow(f"eo position set {place.group} 0 3", place.refused(), tmp_path)
    place.process(3)
    assert place.booked() == [0, 1, 2, 3]


# --- what is no contradiction ---


def test_replay_of_a_running_consumer(place: Place, tmp_path: Path) -> None:
    """A group with members refuses to have its offset moved, so it stays ahead of the position. Also the partition is
    quiet, and only asking tells the worker. Seen to fail with `committed_under >= claim.epoch - 1` taken out of
    refuse_moved_offset (exit 70), and with `_check_claims` taken out of the worker (nothing happens).
    """
    with running(place.app()) as run:
        place.send(0, 1, 2)
        eventually(lambda: place.booked() == [0, 1, 2], "the first three")
        admin = Admin(place.settings)
        eventually(lambda: admin.group_offsets(place.group, place.topic).get(0, (0, ""))[0] == 3, "the group's offset")
        place.run_eo(f"eo position set {place.group} 0 1", tmp_path)
        eventually(lambda: place.booked() == [0, 1, 2, 1, 2], "the replay")
        assert run.end() == 0
    place.process(3)
    assert place.booked() == [0, 1, 2, 1, 2, 3]


def test_replay_of_a_stopped_consumer(place: Place, tmp_path: Path) -> None:
    place.process(0, 1, 2)
    place.run_eo(f"eo position set {place.group} 0 1", tmp_path)
    place.process()
    place.process(3)
    assert place.booked() == [0, 1, 2, 1, 2, 3]


def test_group_offset_behind_the_position(place: Place) -> None:
    """A worker that died between COMMIT and offset commit, or whose last commit came late."""
    place.process(0, 1)
    admin = Admin(place.settings)
    behind = admin.group_offsets(place.group, place.topic)[0]
    place.process(2, 3)
    where = TopicPartition(place.topic, 0, behind[0], metadata=behind[1])
    place.client.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(place.group, [where])])[place.group].result(
        30
    )
    place.process(4)
    assert place.booked() == [0, 1, 2, 3, 4]
