"""The life of one batch: transformed, produced, and committed in one Kafka transaction with the group's offsets.

    records ──> function ──> outputs ──> begin, produce ──> group's offsets ──> commit
                   │ fails                     │ anything but a confirmed commit
                   └─> held, or dead letter    └─> not committed: new producer, offsets read again (worker.py)

A transform has no effects but what it sends, so a message that fails needs no rollback: nothing is sent for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from eoframework import clock, events
from eoframework.errors import (
    Abortable,
    BatchItemFailed,
    DecodeError,
    EoError,
    FailClosed,
    Fenced,
    ProcessDied,
    RestartNeeded,
    Retryable,
)
from eoframework.kafka.membership import Membership
from eoframework.kafka.producer import Outgoing, Rejected
from eoframework.kafka.records import Fetched
from eoframework.kafka.transaction import TransactionalProducer
from eoframework.message import Record
from eoframework.retry import Retry
from eoframework.transform.failure import Failures, Held, after
from eoframework.transform.mark import Mark, Stand
from eoframework.transform.outputs import Outputs
from eoframework.transforms import Transform

# So many messages are transformed before their outputs are sent, and the next ones while Kafka takes those.
_CHUNK = 500
_FRESH = Mark()

DOUBTFUL = (Retryable, Abortable, Fenced, RestartNeeded)
"""What a Kafka transaction raises that was not confirmed: a new producer can go on, from the group's offsets."""


class TooMany(Retryable):
    """Kafka refuses something among the outputs of several messages: with fewer it shows which."""


Result = tuple[Fetched, Record, list[Outgoing] | Exception]
"""What is to be sent for a message, or why it failed. With its record: some can be read only once."""


@dataclass(slots=True)
class Outcome:
    """What became of a batch. Whatever is not in `stands` did not happen and is fetched again."""

    stands: dict[int, Stand] = field(default_factory=dict)
    """Committed: where the group stands now."""
    held: dict[int, Held] = field(default_factory=dict)
    """Partitions that wait for a message."""
    trouble: Exception | None = None
    """The last transaction was not confirmed: whether it happened is to be read from the group's offsets."""


@dataclass(slots=True)
class _Work:
    """One Kafka transaction under way."""

    stands: dict[int, Stand] = field(default_factory=dict)
    held: dict[int, Held] = field(default_factory=dict)
    records: int = 0
    done: int = 0
    last: Fetched | None = None
    begun: bool = False

    def passed(self, ends: dict[int, int]) -> None:
        """The group will stand there: what comes before did not fail."""
        self.stands |= {partition: Stand(end, _FRESH) for partition, end in ends.items()}
        ends.clear()


class Transformer:
    """Runs the messages of one transform, for one thread."""

    def __init__(
        self,
        transform: Transform,
        producer: TransactionalProducer,
        outputs: Outputs,
        failures: Failures,
        *,
        size: int,
        interval: float,
        stopping: Callable[[], bool],
    ) -> None:
        """A transaction has at most `size` messages, and is committed after `interval` seconds."""
        self._transform = transform
        self._topic = transform.topic
        self._function = transform.function
        self._takes_messages = transform.takes_messages
        self._producer = producer
        self._outputs = outputs
        self._failures = failures
        self._size = size
        self._chunk = min(transform.max_batch or _CHUNK, size)
        self._interval = interval
        self._stopping = stopping
        self._doomed: dict[tuple[int, int], EoError] = {}
        """Messages known to fail: the function is not called for them."""
        self._charged: dict[int, Stand] = {}
        """Where a message is counted as in flight, and its transaction was not committed yet; by partition."""

    def run(
        self,
        left: deque[Fetched],
        membership: Membership,
        stands: Mapping[int, Stand],
        *,
        deadline: float,
        confirm: Callable[[], None],
        singly: bool = False,
    ) -> Outcome:
        """Transform and commit what is `left`, in as many Kafka transactions as size and interval make of it.

        Taken from there, and let go when it was handled: held by a caller until thousands are done, the messages leave
        the processor's cache, which took a fifth of the time.

        On a crash: what was sent is visible to read_committed readers exactly if the offsets moved past what it was
        made of. deadline: on the monotonic clock; what is left then is fetched again. confirm: called before each
        transaction's offsets are sent; raises if the topic is no longer the one it was. singly: one message a
        transaction, counted beforehand: one of them may be deadly. Raises FailClosed.
        """
        outcome = Outcome(dict(stands))
        try:
            while left and not (self._stopping() or clock.monotonic() > deadline):
                if not singly:
                    self._transaction(left, membership, outcome, confirm, size=self._size)
                elif left[0].partition in outcome.held:
                    # To count it would move the offset to it, past the message that its partition waits for.
                    left.popleft()
                else:
                    self._count_alone(left[0], membership, outcome)
                    self._transaction(left, membership, outcome, confirm, size=1)
        except DOUBTFUL as trouble:
            self._producer.abort()
            outcome.trouble = trouble
        except Exception:
            self._producer.abort()
            raise
        except BaseException:
            # The process ends of it, which is what was counted.
            self._charged.clear()
            self._producer.abort()
            raise
        return outcome

    def move(self, stands: Mapping[int, Stand], membership: Membership) -> None:
        """Commit these offsets and marks, without any output. Raises one of DOUBTFUL."""
        self._producer.make_ready()
        try:
            self._producer.begin()
            self._commit(stands, membership)
        except Rejected as rejected:
            self._producer.abort()
            raise Retryable(rejected.what) from rejected
        except BaseException:
            self._producer.abort()
            raise

    @property
    def charged(self) -> set[int]:
        """Partitions in which a message may still be counted as in flight."""
        return set(self._charged)

    def take_back(self, found: dict[int, tuple[int, str] | None], member: Callable[[], Membership]) -> None:
        """Uncount, in Kafka and in `found`, messages that we counted before they ran alone and that came to nothing.

        Their process did not die. A topic that is missing for a while, or a worker that stops at them and is started
        again, would have them given up. found: the group's offsets, just read. Raises one of DOUBTFUL.
        """
        innocent = {
            p: Stand(stand.offset, replace(stand.mark, crashes=stand.mark.crashes - 1))
            for p, stand in self._charged.items()
            if found.get(p) == (stand.offset, stand.mark.encode())
        }
        if innocent:
            self.move(innocent, member())
            found |= {p: (stand.offset, stand.mark.encode()) for p, stand in innocent.items()}

    # --- one transaction ---

    def _transaction(
        self, left: deque[Fetched], membership: Membership, outcome: Outcome, confirm: Callable[[], None], *, size: int
    ) -> None:
        """Take what fits into one Kafka transaction from `left`, and commit it."""
        due = clock.monotonic() + self._interval
        work = _Work()
        self._failures.begin()
        self._producer.make_ready()
        try:
            while left and (work.records == 0 or (work.records < size and clock.monotonic() < due)):
                self._send(self._handle(left, outcome, min(self._chunk, size), due), work, outcome)
            self._end(work, membership, outcome, confirm)
        except Rejected as rejected:
            self._refused(rejected, work, left)

    def _send(self, results: Iterable[Result], work: _Work, outcome: Outcome) -> None:
        sending: list[Outgoing] = []
        ends: dict[int, int] = {}
        for fetched, record, result in results:
            partition, offset, _ = fetched
            if partition in work.held or partition in outcome.held:
                continue
            work.records += 1
            work.last = fetched
            if isinstance(result, Exception):
                work.passed(ends)
                sending += self._failed(record, result, work, outcome)
            else:
                sending += result
                work.done += 1
                ends[partition] = offset + 1
        work.passed(ends)
        events.emit("transform.handled", records=work.records)
        if sending:
            self._begin(work)
            self._producer.send(sending)

    def _end(self, work: _Work, membership: Membership, outcome: Outcome, confirm: Callable[[], None]) -> None:
        if not work.stands:
            return
        self._begin(work)
        events.emit("transform.produced", records=work.records)
        confirm()
        self._commit(work.stands, membership)
        outcome.stands |= work.stands
        outcome.held |= work.held
        self._doomed.clear()
        for partition in self._charged.keys() & work.stands.keys():
            del self._charged[partition]
        self._failures.done(work.done)
        events.emit("transform.committed", records=work.records)

    def _begin(self, work: _Work) -> None:
        if not work.begun:
            self._producer.begin()
            work.begun = True

    def _commit(self, stands: Mapping[int, Stand], membership: Membership) -> None:
        offsets = {partition: (stand.offset, stand.mark.encode()) for partition, stand in stands.items()}
        self._producer.send_offsets(self._topic.name, offsets, membership)
        self._producer.commit()

    # --- the function ---

    def _handle(self, left: deque[Fetched], outcome: Outcome, most: int, due: float) -> list[Result]:
        """The function's results for the next messages, in their order."""
        self._outputs.begin()
        if self._transform.batch:
            return self._handle_list([left.popleft() for _ in range(min(most, len(left)))], outcome)
        results: list[Result] = []
        while left and len(results) < most and (not results or clock.monotonic() < due):
            fetched = left.popleft()
            record = fetched.record()
            results.append((fetched, record, self._handle_one(record, outcome)))
        return results

    def _handle_one(self, record: Record, outcome: Outcome) -> list[Outgoing] | Exception:
        try:
            return self._outputs.of(record, self._function(self._given(record, outcome)))
        except Exception as error:  # noqa: BLE001 - whatever the function raises is this message's failure
            return error

    def _handle_list(self, fetched: list[Fetched], outcome: Outcome) -> list[Result]:
        records = [one.record() for one in fetched]
        simple = not (self._takes_messages or self._doomed or any(map(_unreadable, records)))
        if simple and (payloads := self._topic.decode_payloads(records)) is not None:
            return list(zip(fetched, records, self._call_list(records, payloads), strict=True))
        given: list[Any] = []
        unreadable: dict[int, Exception] = {}
        for index, record in enumerate(records):
            try:
                given.append(self._given(record, outcome))
            except EoError as error:
                unreadable[index] = error
        readable = [one for index, one in enumerate(records) if index not in unreadable] if unreadable else records
        results = self._call_list(readable, given)
        for index, why in unreadable.items():
            results.insert(index, why)
        return list(zip(fetched, records, results, strict=True))

    def _call_list(self, records: list[Record], given: list[Any]) -> list[list[Outgoing] | Exception]:
        """Call the function, without one that failed by itself or was named, else in halves, until it succeeds."""
        failed: list[tuple[int, Exception]] = []
        while True:
            try:
                returned = self._transform.call_batch(given) if given else []
                results: list[list[Outgoing] | Exception] = [*self._outputs.of_list(records, returned)]
                break
            except FailClosed:
                raise
            except Exception as error:  # noqa: BLE001 - as above
                culprit, why = _culprit(error, len(given))
            if culprit is None:
                half = len(given) // 2
                results = self._call_list(records[:half], given[:half]) + self._call_list(records[half:], given[half:])
                break
            # In a loop: one call inside the other, the function may name more of them than calls can be nested.
            failed.append((culprit, why))
            records, given = _without(records, culprit), _without(given, culprit)
        for index, why in reversed(failed):
            results.insert(index, why)
        return results

    def _given(self, record: Record, outcome: Outcome) -> Any:
        """What the function takes: the payload, or the message. Raises what is known to be wrong with it."""
        if self._doomed and (known := self._doomed.get(_place(record))) is not None:
            raise known
        if record.unreadable:
            raise DecodeError(f"{record}: {record.unreadable}.")
        if not self._takes_messages:
            return self._topic.decode_payload(record)
        message = self._topic.decode(record)
        attempts = outcome.stands[record.partition].at(record.offset).attempts
        return replace(message, attempt=attempts + 1) if attempts else message

    # --- failures ---

    def _failed(self, record: Record, error: Exception, work: _Work, outcome: Outcome) -> list[Outgoing]:
        """Hold its partition, or give it up; returns its dead letter then."""
        stand = work.stands.get(record.partition) or outcome.stands[record.partition]
        mark = stand.at(record.offset)
        verdict = self._failures.judge(record, mark, error)
        if isinstance(verdict, Held):
            work.held[record.partition] = verdict
            work.stands[record.partition] = Stand(record.offset, after(verdict, mark))
            return []
        letter = self._failures.bury(record, mark, error, verdict)
        work.stands[record.partition] = Stand(record.offset + 1, Mark(deaths=mark.deaths + 1))
        return [letter]

    def _refused(self, rejected: Rejected, work: _Work, left: deque[Fetched]) -> None:
        """Kafka refuses something of this transaction, which was not committed.

        That proves nothing about any message of it: the worker comes again with fewer, until one is alone.
        """
        self._producer.abort()
        if rejected.topic_trouble:
            raise Retryable(f"{rejected.what} Its topics must exist, and be permitted to it.")
        if work.records > 1:
            raise TooMany(f"Kafka refuses something among the outputs of {work.records} messages: {rejected.what}")
        assert work.last is not None
        if _place(work.last) in self._doomed:
            raise FailClosed(
                f"{self._transform.group} at {work.last}: Kafka refuses its dead letter too: {rejected.what}",
                remedy=f"Raise max.message.bytes of {self._transform.dead_letter_topic}; nothing was skipped.",
            )
        self._doomed[_place(work.last)] = rejected
        left.appendleft(work.last)

    def _count_alone(self, fetched: Fetched, membership: Membership, outcome: Outcome) -> None:
        """Write down, before it runs, that this message is in flight: if it ends the process, nobody can any more."""
        if _place(fetched) in self._doomed:
            return
        stand = outcome.stands[fetched.partition]
        mark = stand.at(fetched.offset)
        if mark.crashes >= (self._transform.policy.retry or Retry()).crashes:
            died = ProcessDied(f"{fetched} was in flight {mark.crashes} times when its process died.")
            self._doomed[_place(fetched)] = died
            return
        charged = Stand(fetched.offset, replace(mark, crashes=mark.crashes + 1, takeovers=stand.mark.takeovers))
        self.move({fetched.partition: charged}, membership)
        self._charged[fetched.partition] = outcome.stands[fetched.partition] = charged


_unreadable = attrgetter("unreadable")


def _place(delivery: Record | Fetched) -> tuple[int, int]:
    return delivery.partition, delivery.offset


def _culprit(error: Exception, messages: int) -> tuple[int | None, Exception]:
    """Which of so many messages the function failed on, None if that is not known; and why."""
    named = 0 if messages == 1 else error.index if isinstance(error, BatchItemFailed) else -1
    cause = error.__cause__ if isinstance(error, BatchItemFailed) else None
    return named if 0 <= named < messages else None, cause if isinstance(cause, Exception) else error


def _without(items: list[Any], index: int) -> list[Any]:
    return items[:index] + items[index + 1 :]
