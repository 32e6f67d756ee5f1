"""What becomes of a message that the function fails on: tried again in its place, or given up to `<group>.dlt`.

Kafka has no room to set a message aside and go on with others of its partition in order; so the partition waits for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from eoframework import clock, events
from eoframework.errors import FailClosed
from eoframework.failures import Cause, Parked, cause_of, dead_letter_message, told
from eoframework.kafka.producer import Outgoing, Rejected
from eoframework.message import Record
from eoframework.retry import GiveUp, Tally
from eoframework.transform.mark import Mark
from eoframework.transform.outputs import outgoing
from eoframework.transforms import Transform

log = logging.getLogger(__name__)

_NO_LANE = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Held:
    """A message that its partition waits for."""

    record: Record
    error: Exception
    retry_in: float | None
    """Seconds; None: a person must look."""


class Failures:
    """Decides about failing messages by the transform's policy."""

    def __init__(self, transform: Transform, *, text: bool) -> None:
        """`text`: whether an error's message and traceback may be told."""
        self._transform = transform
        self._retry = transform.policy.retry
        self._text = text
        self._tally = Tally(transform.policy.breaker)
        self._news: list[Callable[[], None]] = []
        """What is told once it is committed."""
        self._dying = 0

    def judge(self, record: Record, mark: Mark, error: Exception) -> Held | GiveUp:
        """What to do about this failure of this message, which failed as often before as `mark` says."""
        if self._retry is None:
            return Held(record, error, None)
        if isinstance(error, Rejected):
            return GiveUp("Kafka refuses what the transform makes of it")
        verdict = self._retry.decide(mark.attempts + 1, error, dice=clock.jitter(0, 1))
        if isinstance(verdict, GiveUp):
            return verdict
        self._news.append(lambda: self._say_held(record, mark, error, verdict))
        return Held(record, error, verdict)

    def bury(self, record: Record, mark: Mark, error: Exception, verdict: GiveUp) -> Outgoing:
        """The dead letter, to be sent in the transaction that moves the offset past it. Raises FailClosed."""
        self._dying += 1
        refusal = self._tally.refuses(run=mark.deaths + 1, dying=self._dying)
        cause = cause_of(error, text=self._text)
        if refusal is not None:
            raise self._tripped(record, refusal, cause, error)
        topic = self._transform.dead_letter_topic
        assert topic is not None
        parked = Parked(_NO_LANE, record, mark.attempts + 1, mark.crashes)
        group = self._transform.group
        letter = dead_letter_message(group, topic, parked, cause, verdict.why, error=cause.error)
        self._news.append(lambda: self._say_dead(record, cause, verdict, error))
        return outgoing(letter, key=letter.key)

    def begin(self) -> None:
        """A transaction begins: what the last one had to tell and did not commit is forgotten."""
        self._news.clear()
        self._dying = 0

    def done(self, messages: int) -> None:
        """It was committed, with so many messages that did not fail."""
        for tell in self._news:
            tell()
        self._tally.done(messages)
        self._tally.died(self._dying)
        self.begin()

    def _tripped(self, record: Record, refusal: str, cause: Cause, error: Exception) -> FailClosed:
        tripped = FailClosed(
            f"{self._transform.group} at {record}: {refusal}; it failed with {told(cause)}.",
            remedy="It was not given up, and runs again. Mend the transform or what it needs, and start again; if "
            "these really are to die, declare the transform with another breaker=.",
        )
        tripped.__cause__ = error
        return tripped

    def _say_held(self, record: Record, mark: Mark, error: Exception, wait: float) -> None:
        log.warning(
            "%s: %s failed (attempt %d, %s); it is tried again in %.1f s, its partition waits, nothing was sent for it",
            *(self._transform.group, record, mark.attempts + 1, told(cause_of(error, text=self._text)), wait),
        )
        events.emit("transform.held", record=record, error=error)

    def _say_dead(self, record: Record, cause: Cause, verdict: GiveUp, error: Exception) -> None:
        log.error(
            "%s: %s is given up because %s (%s); it is in %s, its partition goes on",
            *(self._transform.group, record, verdict.why, told(cause), self._transform.dead_letter_topic),
            exc_info=error if self._text else None,
        )
        events.emit("transform.dead_lettered", record=record)


def after(verdict: Held, mark: Mark) -> Mark:
    """What to remember of a message that is to be tried again: it failed, and did not end its process."""
    attempts = mark.attempts + (verdict.retry_in is not None)
    return Mark(attempts, crashes=max(0, mark.crashes - 1), deaths=mark.deaths)
