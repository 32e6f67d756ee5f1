"""Processed messages are forgotten after their window, in slices, and never at a batch's cost."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta

import pytest
from sqlalchemy import text

from eoframework import clock, events, lifecycle
from eoframework.db.coverage import raise_coverage
from eoframework.db.retention import forget_processed
from eoframework.db.session import Database
from eoframework.prune import PruneWorker
from eoframework.settings import Settings

WEEK = timedelta(days=7)


def remember(database: Database, count: int, *, days_ago: float) -> None:
    with database.begin("test") as connection:
        connection.execute(
            text("INSERT INTO eo.consumer (name, topic) VALUES ('shop.reserve', 't') ON CONFLICT DO NOTHING")
        )
        connection.execute(
            text(
                "INSERT INTO eo.processed_message (consumer_id, message_id, processed_at) SELECT c.id, "
                "gen_random_uuid(), now() - make_interval(secs => :s) FROM eo.consumer c, generate_series(1, :n)"
            ),
            {"s": days_ago * 86400, "n": count},
        )


def remembered(database: Database) -> int:
    with database.engine.connect() as connection:
        return int(connection.scalar(text("SELECT count(*) FROM eo.processed_message")) or 0)


def week_ago() -> datetime:
    return clock.now() - WEEK


def settings_for(database: Database, settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update=changes)


def test_only_what_is_older_than_the_window_goes(database: Database) -> None:
    remember(database, 5, days_ago=7.01)
    remember(database, 3, days_ago=6.99)
    assert forget_processed(database, before=week_ago(), limit=100) == 5
    assert forget_processed(database, before=week_ago(), limit=100) == 0
    assert remembered(database) == 3


def test_a_slice_is_bounded_and_the_worker_goes_on_until_all_is_done(database: Database, settings: Settings) -> None:
    remember(database, 25, days_ago=8)
    assert forget_processed(database, before=week_ago(), limit=10) == 10
    assert remembered(database) == 15
    worker = PruneWorker(database, settings_for(database, settings, prune_batch=10))
    assert worker.step() < 1
    assert not worker.drained()
    assert worker.step() == settings.prune_interval
    assert worker.drained()
    assert remembered(database) == 0


def test_the_lifecycle_runs_it_once(database: Database, settings: Settings) -> None:
    remember(database, 25, days_ago=8)
    worker = PruneWorker(database, settings_for(database, settings, prune_batch=10))
    assert lifecycle.run([worker], stop=threading.Event(), once=True) == 0
    assert remembered(database) == 0


def test_one_worker_prunes_at_a_time(database: Database) -> None:
    """Seen to fail with the advisory lock removed from db/retention.py: both deleted."""
    remember(database, 5, days_ago=8)
    with database.engine.connect() as other:
        other.execute(text("SELECT pg_advisory_xact_lock(1701867117, hashtext('eo'))"))
        assert forget_processed(database, before=week_ago(), limit=100) is None
        assert remembered(database) == 5
    assert forget_processed(database, before=week_ago(), limit=100) == 5


def test_a_row_that_a_batch_holds_is_passed_over(database: Database) -> None:
    """Seen to fail with SKIP LOCKED removed from db/retention.py: the slice waited for the batch, and gave up."""
    remember(database, 5, days_ago=8)
    with database.engine.connect() as batch:
        batch.execute(text("SELECT FROM eo.processed_message LIMIT 2 FOR UPDATE"))
        assert forget_processed(database, before=week_ago(), limit=100) == 3
    assert forget_processed(database, before=week_ago(), limit=100) == 2


def test_a_table_that_cannot_be_had_is_left_for_the_next_time(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail with both timeouts removed from db/retention.py: the worker waited as long as the lock was held."""
    remember(database, 5, days_ago=8)
    caplog.set_level("INFO")
    with database.engine.connect() as locker:
        locker.execute(text("LOCK TABLE eo.processed_message IN ACCESS EXCLUSIVE MODE"))
        assert PruneWorker(database, settings).step() == settings.prune_interval
    assert "next time" in caplog.text
    assert remembered(database) == 5


def test_coverage_is_recorded_before_ids_go(database: Database, settings: Settings) -> None:
    """Seen to fail with the two calls in PruneWorker._forget in the other order: ids went first."""
    remember(database, 5, days_ago=8)
    order: list[tuple[str, int]] = []
    unsubscribe = events.subscribe(lambda name, _: order.append((name, remembered(database))))
    try:
        PruneWorker(database, settings).step()
    finally:
        unsubscribe()
    assert order == [("prune.covered", 5), ("prune.forgotten", 0), ("prune.results_forgotten", 0)]


def test_one_worker_records_coverage_at_a_time(database: Database, settings: Settings) -> None:
    """Seen to fail with the advisory lock removed from db/coverage.py: both recorded, and ids went."""
    remember(database, 5, days_ago=8)
    with database.engine.connect() as other:
        other.execute(text("SELECT pg_advisory_xact_lock(1701867117, hashtext('eo'))"))
        assert raise_coverage(database, older_than=WEEK) is None
        assert PruneWorker(database, settings).step() == settings.prune_interval
        assert remembered(database) == 5
