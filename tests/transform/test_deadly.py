"""Messages that end the process: found, counted, and given up.

A function that raises SystemExit leaves what a killed process leaves: nothing. That a killed process leaves no more
than this is what test_crashes.py shows.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eoframework import Retry
from eoframework.retry import fixed
from eoframework.settings import Settings
from eoframework.transform.mark import Mark
from tests.transform.mill import Flour, Grain, Mill


@pytest.fixture
def mill(settings: Settings) -> Iterator[Mill]:
    made = Mill(settings, partitions=2)
    yield made
    made.stop()


def lives_until(mill: Mill, offset: int, *, partition: int = 0, at_most: int) -> int:
    """Start a new worker each time one dies; how many died until the group got there."""
    for deaths in range(at_most + 1):
        try:
            mill.start()
            mill.run_to(offset, partition=partition)
        except SystemExit:
            continue
        return deaths
    raise AssertionError(f"{at_most} deaths and not there: {mill.offsets()}")


def test_a_deadly_message_is_given_up_and_no_innocent_with_it(mill: Mill) -> None:
    """Seen to fail without `_note_takeovers` (never suspected), and without `_count_alone` (never given up)."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=Retry(crashes=3))
    def grind(grain: Grain) -> Flour:
        if grain.n == 4:
            raise SystemExit(1)
        return Flour(n=grain.n)

    mill.pour(range(8))
    mill.pour([10, 11, 12], partition=1)
    deaths = lives_until(mill, 8, at_most=12)
    assert deaths <= 6
    mill.run_to(3, partition=1)
    ground = mill.ground()
    assert [n for n in ground if n < 10] == [0, 1, 2, 3, 5, 6, 7]
    assert [n for n in ground if n >= 10] == [10, 11, 12]
    (letter,) = mill.read(mill.letters)
    assert letter.value() == b'{"n":4}'
    assert b"its process died each time it ran" in (dict(letter.headers() or ())["eo-dlt-cause"] or b"")


def test_one_kill_makes_nobody_careful(mill: Mill) -> None:
    """Seen to fail with `_STUCK` at 0: every message ran in a transaction of its own after each start."""
    alive = [False]
    calls: list[int] = []

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(batch: list[Grain]) -> list[Flour]:
        if not alive[0]:
            raise SystemExit(1)
        calls.append(len(batch))
        return [Flour(n=grain.n) for grain in batch]

    mill.pour(range(50))
    with pytest.raises(SystemExit):
        mill.run_to(50)
    assert mill.mark() == Mark(takeovers=1)
    alive[0] = True
    mill.start()
    mill.run_to(50)
    assert calls == [50]
    assert mill.mark() == Mark()


def test_progress_ends_the_suspicion(mill: Mill) -> None:
    """Three owners that got nowhere, for a reason that is gone: careful, then as fast as ever."""
    alive = [False]
    calls: list[int] = []

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(batch: list[Grain]) -> list[Flour]:
        if not alive[0]:
            raise SystemExit(1)
        calls.append(len(batch))
        return [Flour(n=grain.n) for grain in batch]

    mill.pour(range(10))
    for _ in range(3):
        mill.start(transform_batch=5)
        with pytest.raises(SystemExit):
            mill.run_to(10)
    assert mill.mark() == Mark(takeovers=3, crashes=1)
    alive[0] = True
    mill.start(transform_batch=5)
    mill.run_to(10)
    mill.pour(range(10, 20))
    mill.run_to(20)
    assert calls[:5] == [1] * 5
    assert max(calls[5:]) == 5
    assert mill.ground() == list(range(20))


def test_an_ordinary_failure_takes_the_charge_back(mill: Mill) -> None:
    """Seen to fail with the crash left in `after`: ten failures would have counted as ten crashes."""
    trouble: list[BaseException] = [SystemExit(1)]

    @mill.app.transform(
        mill.grain, to=mill.flour, name="grind", retry=Retry(attempts=100, backoff=fixed(0.01), crashes=2)
    )
    def grind(grain: Grain) -> Flour:
        raise trouble[0]

    mill.pour([1])
    for _ in range(3):
        mill.start()
        with pytest.raises(SystemExit):
            mill.run_to(1)
    assert mill.mark().crashes == 1
    trouble[0] = ValueError("no")
    mill.start()
    mill.run_until(lambda: mill.mark().attempts >= 4)
    assert (mill.dead(), mill.mark().crashes) == ([], 1)


@pytest.mark.parametrize("metadata", ["", "eo:7", "eo-t:nonsense", "eo-t:attempts=x;", "none"])
def test_what_others_wrote_is_no_mark(metadata: str) -> None:
    assert Mark.decode(metadata) == Mark()


def test_a_mark_comes_back_as_it_was_written() -> None:
    for mark in (Mark(), Mark(1, 2, 3, 4), Mark(deaths=7)):
        assert Mark.decode(mark.encode()) == mark
    assert len(Mark(999_999_999, 999_999_999, 999_999_999, 999_999_999).encode()) < 100


def test_what_waits_behind_a_failing_message_is_not_counted(mill: Mill) -> None:
    """One by one, and the first fails: seen to fail without the check in `_alone`, which moved the offset past it."""
    trouble: list[BaseException] = [SystemExit(1)]

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=Retry(attempts=3, backoff=fixed(0.2)))
    def grind(grain: Grain) -> Flour:
        if grain.n == 0 and trouble:
            raise trouble[0]
        return Flour(n=grain.n)

    mill.pour(range(5))
    for _ in range(3):
        mill.start()
        with pytest.raises(SystemExit):
            mill.run_to(5)
    trouble[0] = ValueError("no")
    mill.start()
    mill.run_until(lambda: mill.mark().attempts == 1)
    assert mill.offset() == 0
    trouble.clear()
    mill.run_to(5)
    assert mill.ground() == list(range(5))
