"""The breaker: too many would die, so the consumer stops instead, and nothing of it is written."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from sqlalchemy import text

from eoframework import App, Breaker, Message, Topic, Tx
from eoframework.consume import failure
from eoframework.db.session import Database
from eoframework.errors import FailClosed
from eoframework.settings import Settings
from tests.conftest import MakeTopic
from tests.consume.harness import column, make_app, make_ledger, run_once, scalar
from tests.consume.rig import Rig
from tests.failure.workbench import Bench, Entry, retrying
from tests.processes import produce

POISON = ValueError("poison")


@pytest.fixture
def app(settings: Settings, database: Database) -> App:
    return make_app(settings, database)


def poisoned(app: App, *numbers: int, attempts: int = 1, **breaker: Any) -> Bench:
    bench = Bench(app, retry=retrying(attempts), breaker=Breaker(**breaker), echo=False)
    bench.broken = dict.fromkeys(numbers, POISON)
    return bench


def feed(bench: Bench, *numbers: int) -> None:
    bench.run(*(bench.entry(n, f"k{n}") for n in numbers))


def run_length(bench: Bench) -> int:
    (length,) = bench.column("SELECT dead_run FROM eo.consumer")
    return int(length)


def test_a_run_in_one_batch(app: App) -> None:
    """Three in a row die, the fourth would be too many: none of that batch is written, and the text says what to do.

    Seen to fail without `raise self._tripped`: four dead letters.
    """
    bench = poisoned(app, 1, 2, 3, 5, 6, 7, 8, run=3)
    feed(bench, 0, 1, 2, 3, 4)
    assert (bench.dead(), run_length(bench)) == ([1, 2, 3], 0)
    with pytest.raises(FailClosed, match="4 messages in a row would be dead") as tripped:
        feed(bench, 5, 6, 7, 8, 9)
    assert tripped.value.exit_code == 70
    assert "breaker=" in tripped.value.remedy
    assert tripped.value.__cause__ is POISON
    assert (bench.dead(), bench.booked()) == ([1, 2, 3], [0, 4])
    assert bench.rig.positions() == [5, 0, 0]


def test_a_run_across_batches_and_processes(app: App) -> None:
    """A supervisor that starts the worker again and again does not get around it; a success ends the run.

    Seen to fail with `set_run` left out of Failures._bury (the new process began at 0), and without `end_run` (it had
    succeeded, and was stopped all the same).
    """
    bench = poisoned(app, *range(1, 4), *range(11, 20), run=3)
    feed(bench, 1, 2)
    feed(bench, 3)
    assert run_length(bench) == 3
    next_offset = bench.rig.positions()[0]
    late = bench.entry(11, "k11")
    bench.rig = Rig(app)
    with pytest.raises(FailClosed, match="in a row"):
        bench.run(late)
    bench.broken.pop(11)
    bench.rig = Rig(app)
    assert bench.run(late).moved == {0: next_offset + 1}
    assert run_length(bench) == 0
    bench.rig._ends[0] = next_offset + 1
    feed(bench, 12, 13, 14)
    assert run_length(bench) == 3
    with pytest.raises(FailClosed, match="in a row"):
        feed(bench, 15)
    assert bench.dead() == [1, 2, 3, 12, 13, 14]


def test_what_dies_after_retries_with_successes_between_is_no_run(app: App) -> None:
    """One in ten is poison, and its retries end in a lull: they die one after another, but between them others lived.

    Seen to fail without `between` in Failures.settle_parked: stopped at the 4th, and for ever after.
    """
    bench = poisoned(app, *range(0, 100, 10), attempts=2, run=3)
    feed(bench, *range(50))
    feed(bench, *range(50, 100))
    bench.drain()
    assert sorted(bench.dead()) == list(range(0, 100, 10))


def test_when_everything_fails_what_dies_after_retries_is_a_run(app: App) -> None:
    bench = poisoned(app, *range(50), attempts=2, run=3)
    feed(bench, *range(10))
    with pytest.raises(FailClosed, match="4 messages in a row"):
        bench.drain()
    assert len(bench.dead()) == 3
    assert len(bench.waiting()) == 7


def test_a_success_of_another_worker_ends_a_run_too(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker's partition brings nothing but poison, another's is well: not all of the consumer dies.

    Seen to fail with the run looked at only by a worker that had dead letters of its own.
    """
    monkeypatch.setattr(failure, "_ASK_EVERY", 0.0)
    bench = poisoned(app, *range(10), run=3)
    ill, well = bench.rig, Rig(app)
    for partition in (0, 2):
        ill.claims[partition] = well.claims[partition]
    for n in range(0, 9, 3):
        feed(bench, n, n + 1, n + 2)
        assert run_length(bench) == 3
        well.run([well.record(b'{"n": 100}', partition=1)])
        assert run_length(bench) == 0
    assert bench.dead() == list(range(9))


def test_a_share(app: App) -> None:
    """Every other one dies. Seen to fail without `_tally.died` in Failures.done: it never stopped."""
    bench = poisoned(app, *range(0, 100, 2), run=100, share=0.4, of=10)
    feed(bench, *range(10))
    with pytest.raises(FailClosed, match="of the last 10 messages would be dead"):
        feed(bench, *range(10, 14))
    assert bench.dead() == [0, 2, 4, 6, 8]


def test_without_a_breaker_all_die(app: App) -> None:
    bench = Bench(app, retry=retrying(1), breaker=None, echo=False)
    bench.broken = dict.fromkeys(range(60), POISON)
    feed(bench, *range(60))
    assert bench.dead() == list(range(60))


def test_a_worker_stops_with_70_and_goes_on_once_mended(
    settings: Settings, database: Database, make_topic: MakeTopic, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad deploy under a supervisor, then a good one: no more than the limit have died in all of it."""
    make_ledger(database.engine)
    topic = make_topic()
    values = [b'{"n": %d}' % n for n in range(40)]
    produce(settings.require_bootstrap_servers(), topic, [(b"k%d" % n, value) for n, value in enumerate(values)])
    name = f"app-{topic}"
    for _ in range(2):
        bad = _deployed(settings, database, name, topic, broken=True)
        with caplog.at_level(logging.ERROR):
            assert run_once(bad) == 70
        assert "in a row would be dead" in caplog.text
        caplog.clear()
        assert scalar(database.engine, "SELECT count(*) FROM eo.dead_letter") <= 5
    assert run_once(_deployed(settings, database, name, topic, broken=False)) == 0
    dead = column(database.engine, "SELECT (convert_from(payload, 'UTF8')::json ->> 'n')::int FROM eo.dead_letter")
    assert len(dead) <= 5, "how many depends on what the first fetches brought"
    assert sorted([*column(database.engine, "SELECT note::int FROM ledger"), *dead]) == list(range(40))


def _deployed(settings: Settings, database: Database, name: str, topic: str, *, broken: bool) -> App:
    app = make_app(settings, database, name)

    @app.handler(Topic(topic, Entry), name="book", retry=retrying(1), breaker=Breaker(run=5))
    def book(message: Message[Entry], tx: Tx) -> None:
        tx.session.execute(text("INSERT INTO ledger (note) VALUES (:n)"), {"n": str(message.payload.n)})
        if broken:
            raise POISON

    return app
