"""The decision about a failed attempt: plain values, no clock, no database."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eoframework import Breaker, Reject, Retry, RetryLater, exponential, fixed
from eoframework.errors import BatchItemFailed, ConfigurationError, DecodeError, EoError, ProcessDied
from eoframework.retry import GiveUp, Tally, streaks

DAYS_30 = 30 * 86_400.0
BACKOFF = st.builds(
    lambda initial, factor, more: exponential(initial, factor, min(initial + more, DAYS_30)),
    st.floats(0, DAYS_30),
    st.floats(1, 1e300),
    st.floats(0, DAYS_30),
)


class Down(Exception):
    pass


class Worse(Down):
    pass


@given(BACKOFF, st.floats(0, 1), st.integers(1, 10**6), st.floats(0, 1))
@example(exponential(1, 2, 10), 0.2, 2_000, 0.5)
@example(exponential(1, 1e10, 10), 0.2, 40, 0.5)
@example(exponential(0, 1e300, 10), 1.0, 5, 1.0)
def test_a_pause_is_never_negative_nor_longer_than_it_may_be(
    backoff: Any, jitter: float, attempt: int, dice: float
) -> None:
    """Seen to fail with `** min(attempts - 1, 64)` and no OverflowError caught: 1e10 ** 40 is one."""
    retry = Retry(attempts=attempt + 1, backoff=backoff, jitter=jitter)
    pause = retry.decide(attempt, Down(), dice=dice)
    assert isinstance(pause, float)
    assert 0 <= pause <= backoff.max * (1 + jitter)


@given(BACKOFF, st.integers(1, 200))
def test_without_jitter_pauses_only_grow(backoff: Any, attempt: int) -> None:
    retry = Retry(attempts=10**9, backoff=backoff, jitter=0)
    first, second = (retry.decide(n, Down(), dice=0.9) for n in (attempt, attempt + 1))
    assert isinstance(first, float)
    assert isinstance(second, float)
    assert first <= second


@given(st.integers(1, 50), st.integers(1, 100))
def test_after_so_many_attempts_it_is_given_up_and_not_before(attempts: int, attempt: int) -> None:
    """Seen to fail with `attempt > self.attempts`."""
    assert isinstance(Retry(attempts=attempts).decide(attempt, Down()), GiveUp) == (attempt >= attempts)


def test_the_pauses_of_a_plain_policy() -> None:
    retry = Retry(attempts=6, backoff=exponential(1, 3, 20), jitter=0)
    assert [retry.decide(n, Down()) for n in range(1, 6)] == [1, 3, 9, 20, 20]
    assert [Retry(backoff=fixed(timedelta(seconds=7)), jitter=0).decide(n, Down()) for n in (1, 4)] == [7, 7]


def test_jitter_spreads_both_ways_around_the_pause() -> None:
    retry = Retry(backoff=fixed(10), jitter=0.2)
    assert [retry.decide(1, Down(), dice=dice) for dice in (0, 0.5, 1)] == [8, 10, 12]


@pytest.mark.parametrize(
    ("policy", "error", "tried_again"),
    [
        (Retry(), Down(), True),
        (Retry(), EoError("x"), True),
        (Retry(), BatchItemFailed(1), True),
        (Retry(), Reject("never"), False),
        (Retry(on=(Reject,)), Reject("never"), False),
        (Retry(), DecodeError("bytes"), False),
        (Retry(on=(DecodeError,)), DecodeError("bytes"), False),
        (Retry(), ProcessDied("died"), False),
        (Retry(never=(Down,)), Down(), False),
        (Retry(never=(Down,)), Worse(), False),
        (Retry(never=(Worse,)), Down(), True),
        (Retry(on=(Down,)), Worse(), True),
        (Retry(on=(Worse,)), Down(), False),
        (Retry(on=(Down,), never=(Worse,)), Worse(), False),
        (Retry(on=()), Down(), False),
        (Retry(on=()), RetryLater(), True),
        (Retry(on=(Down,)), RetryLater(after=3), True),
        (Retry(attempts=1), Down(), False),
        (Retry(attempts=1), RetryLater(after=3), False),
    ],
)
def test_which_errors_are_worth_another_attempt(policy: Retry, error: Exception, *, tried_again: bool) -> None:
    """Decode errors and rejections are final whatever `on` says. Seen to fail with each of decide's lines removed."""
    assert isinstance(policy.decide(1, error), GiveUp) != tried_again


def test_one_class_may_be_given_without_a_tuple() -> None:
    retry = Retry(on=Down, never=Worse)  # type: ignore[arg-type]
    assert (retry.on, retry.never) == ((Down,), (Worse,))


def test_retry_later_says_when_and_is_not_spread() -> None:
    retry = Retry(backoff=fixed(10), jitter=1)
    assert [retry.decide(1, RetryLater(after=3), dice=dice) for dice in (0, 1)] == [3, 3]
    assert retry.decide(1, RetryLater(after=0)) == 0
    assert retry.decide(1, RetryLater(), dice=0.5) == 10


@pytest.mark.parametrize("after", [-1, DAYS_30 + 1, math.nan, math.inf])
def test_retry_later_refuses_a_pause_that_is_none(after: float) -> None:
    with pytest.raises(ValueError, match="30 days"):
        RetryLater(after=after)


@pytest.mark.parametrize(
    "declare",
    [
        lambda: Retry(attempts=0),
        lambda: Retry(crashes=0),
        lambda: Retry(jitter=-0.1),
        lambda: Retry(jitter=1.1),
        lambda: Retry(jitter=math.nan),
        lambda: Retry(on=(KeyboardInterrupt,)),  # type: ignore[arg-type]
        lambda: Retry(never=("ValueError",)),  # type: ignore[arg-type]
        lambda: exponential(-1),
        lambda: exponential(10, max=5),
        lambda: exponential(factor=0.5),
        lambda: exponential(factor=math.nan),
        lambda: exponential(factor=math.inf),
        lambda: exponential(math.nan),
        lambda: exponential(max=math.inf),
        lambda: exponential(max=timedelta(days=31)),
        lambda: fixed(-1),
        lambda: Breaker(run=0),
        lambda: Breaker(share=0),
        lambda: Breaker(share=1.5),
        lambda: Breaker(of=0),
    ],
)
def test_a_policy_that_means_nothing_is_refused(declare: Any) -> None:
    with pytest.raises(ConfigurationError) as refused:
        declare()
    assert refused.value.remedy


# --- the breaker's arithmetic ---


@given(st.integers(0, 5), st.lists(st.booleans(), max_size=40))
def test_runs_of_deaths_are_counted_across_transactions(before: int, deaths: list[bool]) -> None:
    """Against the text: the longest stretch without a success, and the one that goes on."""
    story = "x" * before + "".join("x" if died else "." for died in deaths)
    tail = story.rsplit(".", 1)[-1]
    expected = max(len(part) for part in story.split("."))
    longest, run = streaks(before, deaths)
    assert run == len(tail)
    assert max(longest, before) == max(expected, before)


def test_a_share_is_of_a_full_window() -> None:
    """A window that is not full yet says nothing. Seen to fail with its length not asked for: tripped at the third."""
    tally = Tally(Breaker(run=1000, share=0.5, of=10))
    tally.died(5)
    assert tally.refuses(run=1, dying=1) is None
    tally.done(4)
    assert tally.refuses(run=1, dying=1) is None
    tally.done(1)
    assert "6 of the last 10" in (tally.refuses(run=1, dying=1) or "")
    tally.done(10)
    assert tally.refuses(run=1, dying=1) is None


def test_a_run_is_refused_beyond_its_limit_and_without_a_breaker_nothing_is() -> None:
    assert Tally(Breaker(run=3)).refuses(run=3, dying=3) is None
    assert "4 messages in a row" in (Tally(Breaker(run=3)).refuses(run=4, dying=1) or "")
    assert Tally(None).refuses(run=10**6, dying=10**6) is None
