"""A range once more: what was done is not repeated, what was skipped is done, in its order, beside the live group."""

from __future__ import annotations

import threading
import uuid
from datetime import timedelta

import pytest
from confluent_kafka import Producer
from sqlalchemy import make_url

from eoframework import External, ExternalCall, Message, NotDone, clock
from eoframework.db.processed import ProcessedMessages
from eoframework.db.session import Database, open_database
from eoframework.errors import FailClosed, NotFound
from eoframework.kafka.admin import Admin
from eoframework.kafka.config import transactional_config
from eoframework.message import position_id
from eoframework.reprocess import Bound, Counts
from eoframework.reprocess_range import InvertedRange
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.conftest import MakeTopic, make_settings
from tests.consume.harness import column, running, scalar
from tests.failure.past import Entry, Past, listening
from tests.processes import eventually
from tests.proxy import Moment, proxy_to


@pytest.fixture
def past(settings: Settings, database: Database, topic_name: str) -> Past:
    return Past(settings, database, topic_name)


class TestWithoutForget:
    def test_what_was_done_is_not_repeated_and_the_group_notices_nothing(self, past: Past) -> None:
        """Seen to fail with `_first_timers` returning all that is ready: booked twice."""
        past.send(20)
        past.live()
        before = past.stand()
        tally = past.again()
        assert (tally.ran, tally.duplicates) == (0, 20)
        assert past.booked() == list(range(20))
        assert past.stand() == before

    def test_what_was_skipped_runs_in_order_once_and_publishes_as_the_live_run_would(self, past: Past) -> None:
        past.send(5)
        past.live()
        past.send(20)
        past.move(25)
        assert past.plan().counts.new == 20
        tally = past.again()
        assert (tally.ran, tally.duplicates, tally.reached) == (20, 5, {0: 25})
        assert past.booked() == list(range(25))
        ids = column(past.database.engine, "SELECT id FROM eo.outbox_message ORDER BY seq")
        assert past.again().ran == 0
        assert past.booked() == list(range(25))
        past.run("DELETE FROM eo.outbox_message")
        past.repeat()
        assert column(past.database.engine, "SELECT id FROM eo.outbox_message ORDER BY seq") == ids

    def test_a_batch_handler(self, settings: Settings, database: Database, topic_name: str) -> None:
        past = Past(settings, database, topic_name, batch=True, options={"max_batch": 7})
        past.send(20)
        past.live()
        past.send(20)
        past.move(40)
        past.poison = {25}
        tally = past.again()
        assert [f.offset for f in tally.failed] == [25]
        past.poison = set()
        assert past.again().ran == 1 + tally.behind
        assert sorted(past.booked()) == list(range(40))

    def test_two_at_once_and_the_group_beside_them(self, past: Past) -> None:
        """Seen to fail with the ids not recorded in `_first_timers`: booked by both."""
        past.send(40)
        past.live()
        past.send(200)
        past.move(240)
        jobs = [threading.Thread(target=past.again) for _ in range(2)]
        with running(past.app):
            for job in jobs:
                job.start()
            past.send(60)
            for job in jobs:
                job.join(60)
            eventually(lambda: past.count("ledger") >= 300, "everything booked")
        assert sorted(past.booked()) == list(range(300))
        for key in range(3):
            skipped = [n for n in past.booked() if n % 3 == key and 40 <= n < 240]
            assert skipped == sorted(skipped), f"the order of key {key}"

    def test_audit_rows_say_who_and_what(self, past: Past) -> None:
        past.send(3)
        past.live()
        past.again(actor="jo@desk")
        with past.database.engine.connect() as connection:
            rows = connection.exec_driver_sql("SELECT actor, action, subject, detail FROM eo.audit ORDER BY id").all()
        assert [(r.actor, r.action, r.subject) for r in rows] == [
            ("jo@desk", "reprocess.begin", f"consumer/{past.group}"),
            ("jo@desk", "reprocess.end", f"consumer/{past.group}"),
        ]
        assert rows[0].detail["counts"]["duplicates"] == rows[1].detail["duplicates"] == 3

    def test_rate_and_stop(self, past: Past) -> None:
        past.send(1)
        past.live()
        past.send(30)
        past.move(31)
        stop = threading.Event()
        tally = past.again(rate=10, stop=stop, on_progress=lambda t: stop.set() if t.ran else None)
        assert 0 < tally.ran <= 10
        assert (
            scalar(past.database.engine, "SELECT action FROM eo.audit ORDER BY id DESC LIMIT 1") == "reprocess.stopped"
        )
        assert past.again().ran == 30 - tally.ran
        assert past.booked() == list(range(31))


class TestWhoIsLeftOut:
    def test_parked_messages_their_keys_and_dead_letters(self, past: Past) -> None:
        """Seen to fail with `delivery.place in aside.dead` and with `delivery.lane in shut` removed: they ran."""
        past.options["retry"] = None
        past.send(6)
        past.live()
        past.send(9)
        past.move(15)
        self._park(past, offset=7)  # of key 1, which then waits: 7, 10 and 13
        self._bury(past, offset=6)
        plan = past.plan()
        assert (plan.counts.new, plan.counts.parked, plan.counts.dead) == (5, 3 + 2, 1), plan
        tally = past.again(6)
        assert (tally.ran, tally.parked, tally.dead) == (5, 3, 1)
        assert past.booked() == [0, 1, 2, 3, 4, 5, 8, 9, 11, 12, 14]

    def test_a_failing_message_holds_up_its_key_only(self, past: Past) -> None:
        """Seen to fail with `_is_behind` always False: 10 was booked before 7."""
        past.send(6)
        past.live()
        past.send(9)
        past.move(15)
        past.poison = {7}
        tally = past.again()
        assert [(f.offset, f.cause.error_class) for f in tally.failed] == [(7, "ValueError")]
        assert (tally.ran, tally.behind) == (6, 2 + 0)
        assert past.booked()[6:] == [6, 8, 9, 11, 12, 14]
        assert past.count("eo.parked_message") == past.count("eo.dead_letter") == 0
        past.poison = set()
        assert past.again().ran == 3
        assert past.booked()[12:] == [7, 10, 13]

    def test_a_failing_message_stops_its_partition_where_that_is_the_order(
        self, settings: Settings, database: Database, topic_name: str
    ) -> None:
        past = Past(settings, database, topic_name, options={"ordering": "partition"})
        past.send(3)
        past.live()
        past.send(9)
        past.move(12)
        past.poison = {6}
        tally = past.again()
        assert (tally.ran, len(tally.failed), tally.behind) == (3, 1, 5)
        assert past.booked() == list(range(6))

    def test_undecodable_records_are_told(self, past: Past) -> None:
        past.send(3)
        past.live()
        past.run("SELECT 1")
        from_here = past.sent
        past.send(1)
        self._produce_garbage(past)
        past.move(from_here + 2)
        assert past.plan().counts.undecodable == 1
        tally = past.again()
        assert (tally.ran, tally.undecodable) == (1, 1)
        assert [f.offset for f in tally.failed] == [4]

    def _produce_garbage(self, past: Past) -> None:
        producer = Producer({"bootstrap.servers": past.settings.require_bootstrap_servers()})
        producer.produce(past.topic, b"nonsense", partition=0)
        assert producer.flush(30) == 0

    def _park(self, past: Past, *, offset: int) -> None:
        lane = "substr(encode(sha256('k1'), 'hex'), 1, 32)::uuid"
        place = "SELECT consumer_id, topic_id, partition"
        past.run(
            f"INSERT INTO eo.parked_key (consumer_id, topic_id, partition, lane, key, due_at) {place}, {lane}, 'k1', "
            "now() + interval '1 hour' FROM eo.position"
        )
        past.run(
            'INSERT INTO eo.parked_message (consumer_id, topic_id, partition, lane, "offset", topic, timestamp) '
            f"{place}, {lane}, :o, topic, 0 FROM eo.position",
            o=offset,
        )

    def _bury(self, past: Past, *, offset: int) -> None:
        past.run(
            'INSERT INTO eo.dead_letter (origin, consumer_id, topic_id, partition, "offset", message_id, topic, '
            "timestamp, created_at, cause) SELECT 'handler', consumer_id, topic_id, partition, :o, gen_random_uuid(), "
            "topic, 0, now(), 'test' FROM eo.position",
            o=offset,
        )


class TestRefusals:
    def test_a_range_below_the_coverage(self, past: Past) -> None:
        """Seen to fail with `uncovered` always False: booked a second time."""
        past.send(10)
        past.live()
        past.run("DELETE FROM eo.processed_message")
        past.run(
            "INSERT INTO eo.coverage (consumer_id, topic_id, partition, covered_from) "
            "SELECT consumer_id, topic_id, partition, 6 FROM eo.position"
        )
        assert past.plan().counts.uncovered == 6
        with pytest.raises(FailClosed, match="from offset 6 on, the range begins at 0"):
            past.again()
        with pytest.raises(FailClosed, match="begins at 5"):
            past.again(5)
        assert past.booked() == list(range(10))
        assert past.again(6).ran == 4

    def test_messages_without_an_id(self, past: Past) -> None:
        """Seen to fail with that refusal and the one in Rerun removed: booked a second time."""
        past.send(5, ids=False)
        past.send(5)
        past.live()
        with pytest.raises(FailClosed, match="5 messages of the range have no id"):
            past.again()
        assert past.again(5).duplicates == 5
        assert past.booked() == list(range(10))

    def test_what_is_the_groups_to_process(self, past: Past) -> None:
        """Seen to fail with `_within` returning the offset: booked before the group came there."""
        past.send(10)
        past.live()
        past.send(5)
        for start, end in ((0, 12), (0, "latest"), (11, None), (timedelta(seconds=-60), None), (0, clock.now())):
            with pytest.raises(FailClosed, match="the group's to process"):
                past.plan(start, end, partitions=(0,))  # type: ignore[arg-type]
        assert past.plan().ranges[0].end == 10
        past.live()
        assert past.plan(0, "latest", partitions=(0,)).ranges[0].end == 15

    def test_what_is_not_there(self, past: Past) -> None:
        with pytest.raises(NotFound, match="has never run"):
            past.plan()
        past.send(5)
        past.live()
        with pytest.raises(NotFound, match="no position in partition 3"):
            past.plan(partitions=(3,))
        with pytest.raises(NotFound, match="has offsets 0 to 5, not 99"):
            past.plan(99, partitions=(0,))

    def test_an_offset_without_a_partition(self, settings: Settings, database: Database, make_topic: MakeTopic) -> None:
        past = Past(settings, database, make_topic(partitions=2))
        past.send(3, partition=0)
        past.send(3, partition=1)
        past.live()
        with pytest.raises(NotFound, match="--partition"):
            past.plan(1)
        assert [(r.partition, r.start, r.end) for r in past.plan(1, partitions=[1]).ranges] == [(1, 1, 3)]
        assert past.plan().counts.duplicates == 6

    def test_another_cluster_and_another_topic_of_the_name(self, past: Past) -> None:
        """Also when it happens after the plan. Seen to fail with `refuse_moved` removed: planned and run."""
        past.send(5)
        past.live()
        plan = past.plan()
        past.run("UPDATE eo.position SET topic_id = :id", id=uuid.uuid4())
        with pytest.raises(FailClosed, match="re-created"):
            past.job.run(plan)
        with pytest.raises(FailClosed, match="re-created"):
            past.plan()
        past.run("UPDATE eo.position SET cluster_id = 'another'")
        with pytest.raises(FailClosed, match="cluster"):
            past.plan()

    def test_a_topic_made_anew_between_reading_and_commit(self, past: Past, monkeypatch: pytest.MonkeyPatch) -> None:
        """Seen to fail with `confirm_topic()` removed from Rerun._work: booked."""
        past.send(5)
        past.live()
        past.send(5)
        past.move(10)
        plan = past.plan()
        monkeypatch.setattr(Admin, "ask_topic_id", lambda *_: uuid.uuid4)
        with pytest.raises(FailClosed, match="re-created"):
            past.job.run(plan)
        assert past.booked() == list(range(5))
        last = scalar(past.database.engine, "SELECT action FROM eo.audit ORDER BY id DESC LIMIT 1")
        assert last == "reprocess.failed"

    def test_a_position_set_back_meanwhile(self, past: Past) -> None:
        """Seen to fail with `_refuse_set_back` removed: booked beside the group, which now comes by here."""
        past.send(5)
        past.live()
        past.send(5)
        past.move(10)
        plan = past.plan()
        past.move(7)
        with pytest.raises(FailClosed, match="set back"):
            past.job.run(plan)
        assert past.booked() == list(range(5))


class TestForget:
    def test_effects_are_repeated_once_for_the_number_confirmed(self, past: Past) -> None:
        past.send(6)
        past.send(4, ids=False)
        past.live()
        plan = past.plan(2, partitions=(0,))
        assert plan.counts.repeated == 8
        for wrong in (None, 7):
            with pytest.raises(FailClosed, match="the effects of 8 messages would be repeated"):
                past.job.run(plan, forget=True, confirmed=wrong)
        assert past.booked() == list(range(10))
        assert past.job.run(plan, forget=True, confirmed=8).ran == 8
        assert past.booked() == [*range(10), *range(2, 10)]
        assert past.again(2, 6).duplicates == 4, "their ids are remembered again"

    def test_a_producers_duplicates_are_repeated_once(
        self, settings: Settings, database: Database, topic_name: str
    ) -> None:
        """The same id in two batches. Seen to fail with `processed_at < before` removed: booked at both places."""
        past = Past(settings.model_copy(update={"max_batch": 2}), database, topic_name)
        past.send(4)
        past.sent = 0
        past.send(4)
        past.live()
        assert past.booked() == list(range(4))
        tally = past.repeat()
        assert past.booked() == [*range(4), *range(4)]
        assert (tally.ran, tally.duplicates) == (4, 4)

    def test_a_duplicate_that_comes_in_live_meanwhile_leaves_none_out(
        self, settings: Settings, database: Database, topic_name: str
    ) -> None:
        """Seen to fail with `processed_at < before` in `_REPEAT`: 2 and 3 were not repeated."""
        past = Past(settings.model_copy(update={"max_batch": 2}), database, topic_name)
        past.send(4)
        past.live()
        past.run("UPDATE eo.processed_message SET processed_at = now() - interval '2 hours'")
        later = [uuid.uuid5(uuid.NAMESPACE_OID, str(n)) for n in (2, 3)]
        renewed: list[set[uuid.UUID]] = []

        def duplicate() -> None:
            if not renewed:
                with database.begin("test") as connection:
                    consumer = connection.exec_driver_sql("SELECT id FROM eo.consumer").scalar_one()
                    renewed.append(ProcessedMessages(database.schema).claim(connection, consumer, later))

        with listening("reprocess.handled", duplicate):
            tally = past.repeat()
        assert renewed == [set()], "both were remembered"
        assert (tally.ran, tally.duplicates) == (4, 0)
        assert past.booked() == [*range(4), *range(4)]

    def test_a_failing_repetition_leaves_its_id(self, past: Past) -> None:
        """Seen to fail with the ids deleted in a transaction of their own: run without forget, 3 was booked again."""
        past.send(6)
        past.live()
        past.poison = {3}
        assert [f.offset for f in past.repeat().failed] == [3]
        past.poison = set()
        assert past.again().ran == 0
        assert sorted(past.booked()) == [0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5]

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_a_commit_in_doubt(self, past: Past, moment: Moment) -> None:
        """Also of messages without an id, which are recorded by their place.

        Seen to fail with `_identity` giving a new id to a message without one: booked three times after the COMMIT
        that had happened.
        """
        past.send(3)
        past.send(3, ids=False)
        past.live()
        url = make_url(past.settings.require_database_url())
        with proxy_to(url.host or "", url.port or 5432) as proxy:
            through = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
            database = open_database(through, Schema())
            past.settings = make_settings(through, past.settings.require_bootstrap_servers())
            past.database, direct = database, past.database
            past.app = past.declare(type(past.app)(past.app.name, engine=database.engine, settings=past.settings))
            with listening("reprocess.handled", lambda: proxy.arm(moment) if not proxy.cuts else None):
                tally = past.repeat()
            assert proxy.cuts == 1
            database.engine.dispose()
            past.database = direct
        assert sorted(past.booked()) == sorted([*range(6), *range(6)])
        assert tally.ran + tally.duplicates == 6
        recorded = column(past.database.engine, "SELECT message_id FROM eo.processed_message")
        topic_id = scalar(past.database.engine, "SELECT topic_id FROM eo.position")
        assert position_id(topic_id, 0, 4) in recorded


class TestTheEnd:
    def test_the_error_that_ended_it_is_raised_even_if_postgresql_is_away(
        self, past: Past, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Seen to fail with `note` in the `finally` itself: LostConnection, of the audit row, was raised."""
        past.send(3)
        past.live()
        url = make_url(past.settings.require_database_url())
        with proxy_to(url.host or "", url.port or 5432) as proxy:
            through = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
            past.settings = make_settings(through, past.settings.require_bootstrap_servers())
            past.database = database = open_database(through, Schema())
            past.app = past.declare(type(past.app)(past.app.name, engine=database.engine, settings=past.settings))

            def fail(tally: object) -> None:
                proxy.close()
                raise BrokenPipeError("the real error")

            with pytest.raises(BrokenPipeError, match="the real error"):
                past.again(on_progress=fail)
            database.engine.dispose()
        assert f"reprocess.failed of consumer/{past.group} could not be recorded" in caplog.text

    @pytest.mark.parametrize(
        ("start", "end"),
        [
            (5, 2),
            (timedelta(hours=1), timedelta(hours=2)),
            (clock.now(), clock.now() - timedelta(hours=1)),
            ("latest", "earliest"),
            (timedelta(minutes=-1), 2),
            (3, timedelta(hours=1)),
        ],
    )
    def test_an_end_before_the_start(self, past: Past, start: Bound, end: Bound) -> None:
        past.send(6)
        past.live()
        with pytest.raises(InvertedRange, match="ends before it begins"):
            past.plan(start, end, partitions=(0,))
        assert past.plan(2, 2, partitions=(0,)).counts == Counts(), "an empty one is none"
        assert past.plan(timedelta(hours=1), "latest").counts.duplicates == 6


class TestTheLog:
    def test_markers_and_aborted_records(self, past: Past) -> None:
        """The range ends in offsets without a record. Seen to fail with the end told by a record of `end - 1`: 60 s."""
        producer = Producer(transactional_config(past.settings, transactional_id=past.topic, client_id="test"))
        producer.init_transactions()
        for commit in (True, False, True, False):
            producer.begin_transaction()
            for _ in range(3):
                key, value, headers = past.sending(past.sent)  # type: ignore[misc]
                producer.produce(past.topic, value, key, partition=0, headers=headers)
                past.sent += commit
            producer.flush(30)
            (producer.commit_transaction if commit else producer.abort_transaction)()
        past.live()
        stand = scalar(past.database.engine, "SELECT next_offset FROM eo.position")
        assert past.plan("earliest", "latest").counts.duplicates == 6
        past.move(16)
        plan = past.plan(stand, 16, partitions=(0,))
        assert (plan.ranges[0].start, plan.counts.would_run(forget=True)) == (stand, 0)
        assert past.plan(0, 16, partitions=(0,)).counts.duplicates == 6

    def test_times(self, past: Past) -> None:
        past.send(5)
        past.live()
        clock.sleep(0.05)
        between = clock.now()
        clock.sleep(0.05)
        past.send(5)
        past.live()
        assert past.plan(between).ranges[0].start == 5
        assert past.plan("earliest", between).ranges[0].end == 5
        assert past.plan(timedelta(hours=1)).ranges[0].start == 0
        assert past.plan(clock.now() + timedelta(hours=1)).counts.duplicates == 0


class TestCallsOutside:
    def test_they_are_made_for_what_runs_the_first_time_and_never_again(
        self, settings: Settings, database: Database, topic_name: str
    ) -> None:
        """Seen to fail with `_with_stored_results` giving nothing: the repetition had no result and never ended."""
        called: list[int] = []

        def charge(message: Message[Entry], call: ExternalCall) -> object:
            called.append(message.payload.n)
            if message.payload.n == 7:
                raise NotDone
            return message.payload.n * 100

        past = Past(settings, database, topic_name, options={"external": [External("charge", charge)]}, charges=True)
        past.send(3)
        past.live()
        past.send(6)
        past.move(9)
        tally = past.again()
        assert (tally.ran, tally.duplicates, [f.offset for f in tally.failed]) == (5, 3, [7])
        assert sorted(called) == list(range(9))
        assert past.repeat("earliest", 6).ran == 6
        assert sorted(called) == list(range(9))
        charged = [0, 1, 2, 3, 4, 5, 6, 8, 0, 1, 2, 3, 4, 5]
        assert past.booked() == [n * 100 for n in charged]
