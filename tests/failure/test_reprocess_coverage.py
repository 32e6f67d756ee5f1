"""From which offset on ids are remembered: never a lower one than is true, whatever the position did meanwhile."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import timedelta

import pytest
from sqlalchemy import text

from eoframework import clock
from eoframework.db import coverage
from eoframework.db.coverage import raise_coverage
from eoframework.db.position import Positions, Stream
from eoframework.db.position_admin import PositionAdmin
from eoframework.db.processed import ProcessedMessages
from eoframework.db.retention import forget_processed
from eoframework.db.session import Database
from tests.consume.harness import column, scalar

WEEK = timedelta(days=7)
TOPIC_ID = uuid.UUID(int=7)
CONSUMER = "shop.book"


class Shelf:
    """One consumer's one partition, and its past."""

    def __init__(self, database: Database, *, adopted: bool = False, start: int = 0) -> None:
        self.database = database
        self.positions = Positions(database.schema)
        with database.begin("test") as connection:
            number = self.positions.register(connection, name=CONSUMER, topic="t")
            self.stream = Stream(number, CONSUMER, "t", TOPIC_ID, "cluster")
            self.positions.start(connection, self.stream, {0: start}, adopted=adopted)
        self.run("UPDATE eo.consumer SET created_at = now() - interval '1 year'")

    def run(self, statement: str, **values: object) -> None:
        with self.database.begin("test") as connection:
            connection.execute(text(statement), {"c": self.stream.consumer_id, "t": TOPIC_ID, **values})

    def reach(self, offset: int) -> None:
        self.run("UPDATE eo.position SET next_offset = :o", o=offset)

    def sampled(self, days_ago: float, reached: int) -> None:
        self.run(
            "INSERT INTO eo.position_sample (consumer_id, topic_id, partition, at, reached) "
            "VALUES (:c, :t, 0, now() - make_interval(secs => :s), :o)",
            s=days_ago * 86400,
            o=reached,
        )

    def age(self, days: float) -> None:
        """As if the time had passed."""
        for change in (
            "position_sample SET at = at",
            "processed_message SET processed_at = processed_at",
            "consumer SET created_at = created_at",
        ):
            self.run(f"UPDATE eo.{change} - make_interval(secs => :s)", s=days * 86400)

    def prune(self, older_than: timedelta = WEEK) -> None:
        assert raise_coverage(self.database, older_than=older_than) is not None

    @property
    def covered_from(self) -> int:
        return PositionAdmin(self.database).lines(CONSUMER)[0].covered_from

    def samples(self) -> list[int]:
        return column(self.database.engine, "SELECT reached FROM eo.position_sample ORDER BY at")


@pytest.fixture
def shelf(database: Database) -> Iterator[Shelf]:
    return Shelf(database)


def test_the_first_sample_after_the_window_says_it(shelf: Shelf) -> None:
    """Seen to fail with `FILTER (WHERE s.at >= before)` turned round: the last sample before the window was taken."""
    for days_ago, reached in ((9, 100), (8, 200), (6, 300), (1, 400)):
        shelf.sampled(days_ago, reached)
    shelf.reach(500)
    shelf.prune()
    assert shelf.covered_from == 300
    assert shelf.samples() == [300, 400, 500], "what is too old to be asked for is gone"


def test_without_a_sample_in_the_window_all_that_was_reached_counts_as_forgotten(shelf: Shelf) -> None:
    shelf.sampled(30, 100)
    shelf.reach(500)
    shelf.prune()
    assert shelf.covered_from == 500


def test_a_consumer_younger_than_the_window_has_forgotten_nothing(shelf: Shelf) -> None:
    """Seen to fail with `created_at` removed from the statement that raises: all up to the first sample was lost."""
    shelf.run("UPDATE eo.consumer SET created_at = now() - interval '6 days'")
    shelf.reach(500)
    shelf.prune()
    assert shelf.covered_from == 0


def test_an_idle_consumer_keeps_one_sample_and_stays_right(shelf: Shelf) -> None:
    """Seen to fail with the second half of the statement that thins out removed: a row for every hundredth."""
    shelf.reach(500)
    for _ in range(20):
        shelf.prune()
        shelf.age(1)
    assert shelf.samples() == [500]
    assert shelf.covered_from == 500
    shelf.reach(600)
    shelf.prune()
    shelf.age(1)
    shelf.reach(700)
    shelf.prune()
    assert shelf.covered_from == 500, "its ids are a day old"
    shelf.age(30)
    shelf.prune()
    assert shelf.covered_from == 700


def test_samples_are_at_most_so_many(shelf: Shelf) -> None:
    """Seen to fail with the WHERE of the statement that samples removed: one for every call."""
    for offset in range(1, 20):
        shelf.reach(offset)
        shelf.prune()
    assert shelf.samples() == [1]


def test_a_position_set_back_keeps_what_it_had_reached(shelf: Shelf) -> None:
    """Ids of the way there are older than those of the way back, which are duplicates and record nothing.

    Seen to fail with `note_reached` removed from PositionAdmin.move, and with `greatest(...)` from the sample: covered
    from 20 on although the ids of 20 to 999 were gone.
    """
    shelf.run("UPDATE eo.consumer SET created_at = now()")
    shelf.reach(1000)
    desk = PositionAdmin(shelf.database)
    desk.move(desk.lines(CONSUMER)[0], 10)
    shelf.age(3)
    shelf.reach(20)
    shelf.prune()
    shelf.age(5)
    shelf.reach(1000)
    shelf.prune()
    assert shelf.covered_from == 1000


def test_forgotten_positions_do_not_take_it_along(shelf: Shelf) -> None:
    """Seen to fail with `note_reached` removed from PositionAdmin.forget: covered from 0 on."""
    shelf.reach(1000)
    PositionAdmin(shelf.database).forget(CONSUMER)
    shelf.age(8)
    shelf.prune()
    with shelf.database.begin("test") as connection:
        shelf.positions.start(connection, shelf.stream, {0: 1200})
    assert shelf.covered_from == 1000
    shelf.age(30)
    shelf.prune()
    assert shelf.samples() == [1200]
    assert shelf.covered_from == 1200


def test_adopted_offsets_have_no_ids_before_them(database: Database) -> None:
    """Seen to fail with `adopted` not passed on by Positions.start: covered from 0 on."""
    assert Shelf(database, adopted=True, start=300).covered_from == 300


def test_a_duplicate_keeps_the_id_of_a_message_long_before(shelf: Shelf) -> None:
    """Offset 10 and, six days later, offset 500 bear one id.

    Seen to fail with `_RENEW` not executed: the id was gone on the eighth day, and 500 counted as covered.
    """
    database, identity = shelf.database, uuid.uuid4()
    processed = ProcessedMessages(database.schema)
    for days, reached in ((0, 11), (1.5, 12), (4.5, 501), (2, 600)):
        shelf.age(days)
        shelf.reach(reached)
        shelf.prune()
        if reached < 600:
            with database.begin("test") as connection:
                new = processed.claim(connection, shelf.stream.consumer_id, [identity])
            assert bool(new) == (reached == 11)
    assert shelf.covered_from == 12
    covered = raise_coverage(database, older_than=WEEK)
    assert covered is not None
    assert forget_processed(database, before=covered.before, limit=10) == 0
    shelf.age(8)
    shelf.prune()
    assert shelf.covered_from >= 501


def test_a_batch_under_way_is_not_overlooked(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """An id bears the time at which its transaction began; the position moves when that ends.

    Seen to fail with `min(a.xact_start)` removed from the horizon: its id was forgotten, and offset 0 counted as
    covered.
    """
    # These would cover for transactions of an hour, and of the seconds that this test takes.
    monkeypatch.setattr(coverage, "RENEW_AFTER", timedelta(0))
    monkeypatch.setattr(coverage, "_MARGIN", timedelta(0))
    database = shelf.database
    with database.engine.connect() as batch:
        batch.execute(text("UPDATE eo.position SET next_offset = 10"))
        batch.execute(
            text("INSERT INTO eo.processed_message (consumer_id, message_id) VALUES (:c, gen_random_uuid())"),
            {"c": shelf.stream.consumer_id},
        )
        clock.sleep(0.3)
        shelf.prune()
        batch.commit()
    shelf.age(1)
    age = scalar(database.engine, "SELECT clock_timestamp() - processed_at FROM eo.processed_message")
    covered = raise_coverage(database, older_than=age - timedelta(seconds=0.15))
    assert covered is not None
    assert forget_processed(database, before=covered.before, limit=10) == 1
    assert shelf.covered_from == 10


def test_no_batch_waits_for_it_and_it_waits_for_none(shelf: Shelf) -> None:
    """Seen to fail with covered_from in the position row: lock timeout."""
    shelf.sampled(6, 300)
    shelf.reach(500)
    with shelf.database.engine.connect() as batch:
        batch.execute(text("SELECT FROM eo.position FOR UPDATE"))
        shelf.prune()
    assert shelf.covered_from == 300
