"""What is done about a message whose handler fails: plain values and one decision, no clock and no database."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from eoframework.errors import ConfigurationError, DecodeError, ProcessDied, Reject, RetryLater

Ordering = Literal["key", "partition", "none"]
AfterDead = Literal["continue", "hold"]
Errors = tuple[type[Exception], ...]

_LONGEST = timedelta(days=30).total_seconds()


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds before the n-th attempt: `initial`, times `factor` for each one after it, at most `max`."""

    initial: float
    factor: float
    max: float

    def after(self, attempts: int) -> float:
        """The pause after so many failed attempts."""
        try:
            return min(self.max, self.initial * self.factor ** (attempts - 1))
        except OverflowError:  # 2.0 ** 2000: a retry must not fail of its own arithmetic
            return self.max if self.initial else 0.0


def exponential(
    initial: float | timedelta = 1.0,
    factor: float = 3.0,
    max: float | timedelta = 300.0,  # noqa: A002 - its name
) -> Backoff:
    """Pauses that grow: `initial` seconds after the first failure, each one `factor` times the last, at most `max`."""
    first, longest = _seconds(initial), _seconds(max)
    if not (first >= 0 and 1 <= factor < math.inf and first <= longest <= _LONGEST):
        raise ConfigurationError(
            f"exponential(initial={first:g}, factor={factor:g}, max={longest:g}) is no back-off.",
            remedy="0 <= initial <= max <= 30 days, factor >= 1; in seconds.",
        )
    return Backoff(first, factor, longest)


def fixed(pause: float | timedelta) -> Backoff:
    """The same pause, in seconds, after every failure."""
    return exponential(pause, 1.0, pause)


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The message is a dead letter; `why` completes "given up because ...": for people."""

    why: str


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and when a failing message is tried again.

    attempts: after so many failures it is given up, so 1 means that none is retried. (One that failed among others
    is called once more, alone, before that counts as its first.) backoff: the pauses between. jitter: the
    share of each pause that is left to chance, so that what failed together does not come back together. on: only
    these exceptions are worth another attempt; never: these are not, whatever `on` says. crashes: how often a message
    may be the one in flight when its process dies; more than `attempts`, since a deploy or the kernel's memory killer
    can hit an innocent.
    Conflicts in the database, lost connections and outages of Kafka or PostgreSQL are run again and never counted.
    """

    attempts: int = 5
    backoff: Backoff = field(default_factory=exponential)
    jitter: float = 0.2
    on: Errors = (Exception,)
    never: Errors = ()
    crashes: int = 10

    def __post_init__(self) -> None:
        for name, wrong in (("attempts", self.attempts < 1), ("crashes", self.crashes < 1)):
            if wrong:
                raise ConfigurationError(f"Retry({name}={getattr(self, name)}).", remedy="It starts at 1.")
        if not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"Retry(jitter={self.jitter}).", remedy="It is a share, between 0 and 1.")
        for name in ("on", "never"):
            kinds = getattr(self, name)
            if isinstance(kinds, type):
                kinds = (kinds,)
                object.__setattr__(self, name, kinds)
            if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
                raise ConfigurationError(f"Retry({name}={kinds!r}).", remedy="Give exception classes.")

    def decide(self, attempt: int, error: Exception, *, dice: float = 0.5) -> float | GiveUp:
        """Seconds until the next attempt after the `attempt`-th one failed with `error`, or GiveUp.

        dice: a random number between 0 and 1, which spreads the pause by `jitter`.
        """
        if isinstance(error, Reject):
            return GiveUp(error.because)
        if isinstance(error, DecodeError):
            return GiveUp("it cannot be decoded, and would not be the next time")
        if isinstance(error, ProcessDied):
            return GiveUp("its process died each time it ran")
        if isinstance(error, self.never):
            return GiveUp(f"{type(error).__name__} is never retried")
        if not isinstance(error, (RetryLater, *self.on)):
            return GiveUp(f"{type(error).__name__} is not among the errors to retry")
        if attempt >= self.attempts:
            return GiveUp(f"attempt {attempt} of {self.attempts} failed")
        if isinstance(error, RetryLater) and error.after is not None:
            return error.after
        pause = self.backoff.after(attempt)
        return pause * (1 + self.jitter * (2 * dice - 1))


@dataclass(frozen=True, slots=True)
class Breaker:
    """Stops the consumer instead of writing one more dead letter, when too many would die.

    A bad deploy must not empty a topic into the dead letters. run: so many in a row, without a success between (kept in
    the database, so a supervisor that starts again and again does not get around it). share: of the last `of`
    messages.
    """

    run: int = 20
    share: float = 0.5
    of: int = 200

    def __post_init__(self) -> None:
        if self.run < 1 or not 0 < self.share <= 1 or self.of < 1:
            raise ConfigurationError(f"{self!r} is no breaker.", remedy="run >= 1, 0 < share <= 1, of >= 1.")


class Tally:
    """What became of the last messages of one worker, for its breaker."""

    def __init__(self, breaker: Breaker | None) -> None:
        self._breaker = breaker
        self._last: deque[bool] = deque(maxlen=breaker.of if breaker else 0)

    def done(self, messages: int) -> None:
        """So many were processed."""
        if self._breaker is not None:
            self._last.extend([False] * min(messages, self._breaker.of))

    def died(self, messages: int) -> None:
        """So many became dead letters."""
        self._last.extend([True] * messages)

    def refuses(self, *, run: int, dying: int) -> str | None:
        """Why `dying` more dead letters may not be written, `run` of them in a row; None if they may."""
        breaker = self._breaker
        if breaker is None:
            return None
        if run > breaker.run:
            return f"{run} messages in a row would be dead (limit {breaker.run})"
        dead = sum(self._last) + dying
        if len(self._last) == breaker.of and dead > breaker.share * breaker.of:
            return f"{dead} of the last {breaker.of} messages would be dead (limit {breaker.share:.0%})"
        return None


def streaks(run: int, deaths: Iterable[bool]) -> tuple[int, int]:
    """The longest run of deaths, and the one at the end, when `run` of them came right before."""
    longest = 0
    for died in deaths:
        run = run + 1 if died else 0
        longest = max(longest, run)
    return longest, run


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """Everything a handler says about failing messages; `retry` None: they stop their partition."""

    retry: Retry | None = field(default_factory=Retry)
    ordering: Ordering = "key"
    after_dead: AfterDead = "continue"
    dead_letter_topic: bool = False
    max_parked: int = 10_000
    breaker: Breaker | None = field(default_factory=Breaker)

    @property
    def parks(self) -> bool:
        """Whether a failing message makes room for others, instead of stopping its partition."""
        return self.retry is not None and self.ordering != "partition"


def _seconds(span: float | timedelta) -> float:
    return span.total_seconds() if isinstance(span, timedelta) else float(span)
