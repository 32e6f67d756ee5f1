"""While messages fail: no innocent is condemned, nothing stalls for good, no handler is called for nothing."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

from eoframework import App, Message, Retry, Tx, clock, fixed
from eoframework.consume.external import ExternalCalls
from eoframework.consume.failure import ParkingFull
from eoframework.db.session import Database
from eoframework.errors import FailClosed, HandlerTimedOut, LostConnection, TimedOut
from eoframework.external import External, ExternalCall, Results
from eoframework.settings import Settings
from tests.consume.harness import make_app
from tests.failure.workbench import NEVER, Bench, Entry, retrying

SLOW = "SET LOCAL statement_timeout = 10", "SELECT pg_sleep(1)"


@pytest.fixture
def app(settings: Settings, database: Database) -> App:
    return make_app(settings, database)


def too_slow(_: Message[Entry], tx: Tx) -> None:
    for statement in SLOW:
        tx.session.execute(text(statement))


def test_a_message_that_finds_no_room_after_a_crash_is_charged_once(app: App) -> None:
    """Seen to fail with `if outcome.trouble is None` before the `pop` in Executor._charged: each second that there was
    no room charged one more crash, and after ten it was a dead letter, although no process had died.
    """
    bench = Bench(app, retry=retrying(crashes=3), max_parked=1)
    bench.broken = {0: ValueError("hot"), 1: ValueError("innocent")}
    assert bench.run(bench.entry(0, "hot")).parked == 1
    stuck = bench.entry(1, "other")
    for _ in range(6):
        outcome = bench.rig.run([stuck], careful={0})
        assert isinstance(outcome.failed[0].error, ParkingFull)
        assert outcome.failed[0].retry_in is not None
    assert bench.dead() == []
    assert bench.column("SELECT crashes FROM eo.attempt") == [1]


def test_a_batch_in_which_everything_fails_ends_with_its_time(app: App) -> None:
    """Seen to fail with `walk.ran` for `walk.progress` in HandlerCalls: 60 messages were called 115 times first."""
    bench = Bench(app)
    bench.rig.limit_time(0.2)

    def fail_slowly(_: Message[Entry], __: Tx) -> None:
        clock.sleep(0.05)
        raise ValueError("slowly")

    bench.broken = dict.fromkeys(range(60), fail_slowly)
    records = [bench.entry(n, f"k{n}") for n in range(60)]
    first = bench.run(*records)
    assert 0 < first.moved[0] < 30
    assert len(bench.called) < 40
    assert bench.waiting() == list(range(first.moved[0]))
    second = bench.run(*records[first.moved[0] :])
    assert second.moved[0] > first.moved[0], "and the next one gets on"


def test_a_statement_that_never_ends_in_time_is_at_last_its_messages_failure(app: App) -> None:
    """Seen to fail with Failures.timed_out answering None: the batch ran again for ever, nothing behind it was run."""
    bench = Bench(app, retry=retrying(attempts=2))
    bench.broken = {1: too_slow}
    records = [bench.entry(0, "a"), bench.entry(1, "b"), bench.entry(2, "c")]
    troubles = 0
    while records:
        outcome = bench.run(*records)
        assert outcome.trouble is None or isinstance(outcome.trouble, TimedOut)
        troubles += outcome.trouble is not None
        assert troubles <= 2, "twice is the database's trouble, then it is the message's failure"
        records = [r for r in records if r.offset >= bench.rig.claims[0].next_offset]
    assert bench.booked() == [0, 2]
    assert bench.parked() == [(1, 1, 0)]
    drained = [bench.drain() for _ in range(4)]
    assert sum(isinstance(outcome.trouble, TimedOut) for outcome in drained) <= 2
    for _ in range(6):
        bench.make_due()
        bench.drain()
    assert bench.dead() == [1]
    assert bench.column("SELECT error_class FROM eo.dead_letter") == [f"eoframework.errors.{HandlerTimedOut.__name__}"]


def test_a_lane_in_passing_trouble_lets_the_others_go_first(app: App) -> None:
    """Seen to fail without Drain._give_way: the lane stayed the first that was due, and got every turn."""
    bench = Bench(app, retry=retrying())
    bench.broken = dict.fromkeys((0, 1), ValueError("not yet"))
    bench.run(bench.entry(0, "a"), bench.entry(1, "b"))

    def conflict(_: Message[Entry], tx: Tx) -> None:
        tx.session.execute(text("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$"))

    bench.broken = {0: conflict}
    for _ in range(3):
        bench.drain()
    assert bench.booked() == [1]
    assert bench.parked() == [(0, 1, 0)], "and it is no attempt"


def test_no_message_is_blamed_for_a_database_that_has_become_read_only(app: App) -> None:
    """A failover leaves us with a connection to what is a standby now.

    Seen to fail with 25006 taken out of `_LOST`: exit code 70, at a message whose handler had not been called.
    """
    bench = Bench(app)
    record = bench.entry(0)
    bench.rig.connection.discard()
    with bench.rig.connection.begin("read-only") as connection:
        connection.exec_driver_sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
    outcome = bench.run(record)
    assert isinstance(outcome.trouble, LostConnection)
    assert bench.called == []
    bench.rig.connection.discard()
    with bench.rig.connection.begin("open"):
        pass
    assert bench.run(record).moved == {0: 1}


def test_an_error_of_our_own_statements_stops_the_consumer_and_blames_nobody(app: App) -> None:
    """Seen to fail without `blameless` in Executor._work (a message was given up) and with `attempt` for `certain` in
    Drain._look (it was tried without a pause, and without a word).
    """
    bench = Bench(app)
    record = bench.entry(0)
    bench.execute("ALTER TABLE eo.parked_key RENAME COLUMN due_at TO due")
    bench.execute("ALTER TABLE eo.parked_key RENAME COLUMN lane TO alley")
    with pytest.raises(FailClosed, match="No message was run"):
        bench.run(record)
    with pytest.raises(FailClosed, match="look for due messages"):
        bench.drain()
    assert bench.called == []


def test_without_room_no_handler_is_called_for_what_comes_behind(app: App) -> None:
    """Seen to fail without `check_room`: all of the batch was called twice a second, and rolled back."""
    bench = Bench(app, max_parked=1)
    bench.broken = {0: ValueError("hot")}
    bench.run(bench.entry(0, "hot"))
    bench.called.clear()
    behind = bench.entry(1, "hot")
    records = [behind, *(bench.entry(n, f"k{n}") for n in range(2, 40))]
    outcome = bench.run(*records)
    assert isinstance(outcome.failed[0].error, ParkingFull)
    assert (outcome.moved, bench.called) == ({}, [])
    other = [bench.entry(n, f"k{n}", partition=1) for n in range(40, 45)]
    outcome = bench.run(behind, *other)
    assert outcome.moved == {1: 5}, "another partition goes on"


@pytest.mark.parametrize("options", [{}, {"ordering": "partition"}], ids=["key", "partition"])
def test_a_culprit_among_many_is_called_once_more_alone(app: App, options: dict[str, Any]) -> None:
    """Seen to fail with a HandlerError that does not say at which message: called 3 and 10 times."""
    bench = Bench(app, retry=Retry(attempts=3, backoff=fixed(NEVER)), **options)
    bench.broken = {300: ValueError("three hundred")}
    bench.run(*(bench.entry(n, f"k{n}") for n in range(400)))
    assert [n for n, _ in bench.called].count(300) == 2


def test_a_duplicate_that_is_none_any_more_does_not_run_without_its_call(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its twin was processed when its calls were due, and was taken back before it ran (a replay does that).

    Seen to fail without `_check_called_outside`: the handler ran, and the call was never made.
    """
    made: list[int] = []

    def call(message: Message[Entry], _: ExternalCall) -> None:
        made.append(message.payload.n)

    bench = Bench(app, external=[External("mail", call, unresolved="retry")])
    bench.run(bench.entry(0))
    prepare = ExternalCalls.prepare

    def and_then_forget(calls: ExternalCalls, message: Message[object]) -> Results:
        results = prepare(calls, message)
        bench.execute("DELETE FROM eo.processed_message; DELETE FROM eo.external_call")
        return results

    twin = bench.entry(0)
    monkeypatch.setattr(ExternalCalls, "prepare", and_then_forget)
    assert bench.run(twin).trouble is not None
    monkeypatch.setattr(ExternalCalls, "prepare", prepare)
    assert bench.run(twin).moved == {0: 2}
    assert (made, bench.booked()) == ([0, 0], [0, 0]), "a call for each effect"


def test_a_slow_parked_message_is_paid_back_by_the_next_steps(app: App) -> None:
    """Seen to fail without the credit of Drain.run: each step, however short, ran one more slow message."""
    bench = Bench(app, retry=retrying())
    bench.broken = dict.fromkeys(range(5), ValueError("later"))
    bench.run(*(bench.entry(n, f"k{n}") for n in range(5)))
    bench.called.clear()
    bench.broken = dict.fromkeys(range(5), lambda *_: clock.sleep(0.3))
    steps = 0
    started = clock.monotonic()
    while clock.monotonic() - started < 1.0:
        bench.rig.run_parked(seconds=0.01)
        clock.sleep(0.02)
        steps += 1
    assert 1 <= len(bench.called) <= 2, f"in {steps} steps"


def test_an_outside_call_that_leaves_the_process_is_its_messages_failure(app: App) -> None:
    """Seen to fail without `except LEAVING` in Unit.call_outside: SystemExit came out of the executor."""

    def leave(_: Message[Entry], __: ExternalCall) -> None:
        raise SystemExit(3)

    bench = Bench(app, external=[External("mail", leave)])
    assert bench.run(bench.entry(0)).parked == 1
    assert bench.column("SELECT error_class FROM eo.parked_message") == ["eoframework.errors.HandlerMisuse"]
