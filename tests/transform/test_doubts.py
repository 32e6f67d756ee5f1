"""What a live worker's troubles must not do: end it, charge messages, run them before their time, or skip any."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from eoframework import Message, Out, Retry
from eoframework.errors import BatchItemFailed, FailClosed, Fenced, Retryable
from eoframework.kafka.membership import Membership
from eoframework.kafka.offsets import OutOfRange
from eoframework.lifecycle import Backoff
from eoframework.retry import fixed
from eoframework.settings import Settings
from eoframework.transform.mark import Mark
from eoframework.transform.worker import TransformWorker
from tests.transform.mill import NEVER, Flour, Grain, Mill

QUICK = Backoff(first=0.01, longest=0.02)


@pytest.fixture
def mill(settings: Settings) -> Iterator[Mill]:
    made = Mill(settings, partitions=2)
    yield made
    made.stop()


def outdated(now: Membership) -> Membership:
    """As a member of an earlier generation: what a worker holds that was frozen while the group went on."""
    raw = now.raw[:7] + struct.pack("<i", now.generation - 1) + now.raw[11:]
    return Membership(raw, now.group, now.generation - 1, now.member)


def refused_once(worker: TransformWorker) -> list[Membership]:
    """Its next Kafka transaction is refused by the group; returns the memberships asked for."""
    consumer = worker._member()
    ask: Callable[[], Membership] = consumer.membership
    asked: list[Membership] = []

    def membership() -> Membership:
        asked.append(ask())
        return outdated(asked[-1]) if len(asked) == 1 else asked[-1]

    consumer.membership = membership  # type: ignore[method-assign]
    return asked


@pytest.mark.parametrize("offsets", ["first", "known"])
def test_refused_by_the_group_before_its_first_batch(mill: Mill, offsets: str) -> None:
    """A rebalance between fetch and the note of a take-over, or at the first offsets.

    Seen to fail without Abortable in DOUBTFUL: the process ended.
    """

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(grain: Grain) -> Flour:
        return Flour(n=grain.n)

    if offsets == "known":
        mill.run_until(lambda: len(mill.offsets()) == 2)
    mill.pour(range(3))
    asked = refused_once(mill.start())
    mill.run_to(3)
    assert len(asked) > 1
    assert mill.ground() == [0, 1, 2]


def test_no_crash_is_charged_while_a_target_is_missing(mill: Mill) -> None:
    """Three doubts made its partition suspicious, each further one counted as a death, and the message was given up.

    Seen to fail without `take_back`, and with every doubt taken for a take-over.
    """
    other = type(mill.flour)(f"{mill.flour.name}.other", Flour)
    mill.admin.create(other.name, partitions=1, replicas=1, config={})

    @mill.app.transform(mill.grain, to={mill.flour, other}, name="grind", retry=Retry(crashes=1))
    def grind(grain: Grain) -> Out[Flour]:
        return Out(other, Flour(n=grain.n))

    seen = doubts_of(mill.start(transform_message_timeout=0.3))
    mill.admin._client.delete_topics([other.name])[other.name].result()
    mill.pour([1, 2])
    mill.run_until(lambda: len(seen) >= 6)
    assert mill.dead() == []
    mill.admin.create(other.name, partitions=1, replicas=1, config={})
    mill.run_to(2, within=60)
    assert mill.dead() == []
    assert [m.value() for m in mill.read(other.name)] == [b'{"n":1,"text":""}', b'{"n":2,"text":""}']


def doubts_of(worker: TransformWorker) -> list[object]:
    """Grows each time it gives way, after which it waits only for a moment."""
    seen: list[object] = []
    doubt = worker._doubt

    def counted(*given: Any) -> None:
        seen.append(given)
        doubt(*given)

    worker._pause = QUICK
    worker._doubt = counted  # type: ignore[method-assign, assignment]
    return seen


def test_no_crash_is_charged_for_stopping_in_order(mill: Mill) -> None:
    """Under a supervisor that starts again and again. Seen to fail without `_leave_no_charge`: it was given up."""
    wrong = [True]

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=Retry(crashes=2))
    def grind(batch: list[Grain]) -> list[Flour]:
        return [Flour(n=grain.n) for grain in batch][wrong[0] :]

    mill.pour(range(3))
    for _ in range(7):
        mill.start()
        with pytest.raises(FailClosed, match="results for"):
            mill.run_to(3)
    mill.stop()
    assert mill.mark().crashes == 0
    wrong[0] = False
    mill.run_to(3)
    assert (mill.ground(), mill.dead()) == ([0, 1, 2], [])


def test_a_message_waits_its_time_whatever_happens(mill: Mill) -> None:
    """Restarts and doubts. Seen to fail while it ran at once after each: three of them, and it was given up."""
    calls: list[int] = []

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=Retry(attempts=3, backoff=fixed(NEVER)))
    def grind(message: Message[Grain]) -> Flour:
        calls.append(message.payload.n)
        if message.payload.n == 2:
            raise ValueError("no")
        return Flour(n=message.payload.n)

    mill.pour([1, 2, 3])
    mill.run_to(1)
    for _ in range(3):
        mill.start()
        mill.pour([9], partition=1)
        mill.run_to((mill.offset(1) or 0) + 1, partition=1)
        worker = mill.worker
        assert worker is not None
        mill.pour([9], partition=1)
        refused_once(worker)
        at = mill.offset(1) or 0
        mill.run_to(at + 1, partition=1)
    assert calls.count(2) == 1
    assert mill.mark().attempts == 1
    assert mill.dead() == []


def test_a_message_that_is_due_again_is_not_drained(mill: Mill) -> None:
    """With `--once`, and a fetch that returns empty-handed just then. Seen to fail while `_blocked` was kept."""
    failing = [ValueError("no")]

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=Retry(attempts=3, backoff=fixed(NEVER)))
    def grind(grain: Grain) -> Flour:
        if failing:
            raise failing.pop()
        return Flour(n=grain.n)

    mill.pour([1])
    worker = TransformWorker(mill.app.transforms[0], app=mill.app, settings=mill.settings, admin=mill.admin, once=True)
    worker.start()
    mill.worker = worker
    mill.run_until(lambda: 0 in worker._retry_at)
    consumer = worker._member()
    mill.run_until(lambda: 1 in consumer.ended)
    fetch, consumer.fetch = consumer.fetch, lambda *_, **__: []  # type: ignore[method-assign]
    worker._retry_at[0] = 0.0
    worker.step()
    assert not worker.drained()
    consumer.fetch = fetch  # type: ignore[method-assign]
    mill.run_until(worker.drained)
    assert mill.ground() == [1]


def test_out_of_range_while_kafka_does_not_answer(mill: Mill) -> None:
    """Told once, with records of another partition; a question beside it timed out, and the step was tried again.

    Seen to fail (the records of the other partition were skipped, the offset moved past them) without `suppress`.
    """

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(grain: Grain) -> Flour:
        return Flour(n=grain.n)

    mill.pour([1])
    mill.run_to(1)
    worker = mill.worker
    assert worker is not None

    def no_answer(_stream: object) -> Callable[[], None]:
        def answer() -> None:
            raise Retryable("asking the id of the topic: no answer.")

        return answer

    def out_of_range(*_: object, **__: object) -> None:
        raise OutOfRange("the stored position is outside the log")

    worker._beginning.ask_topic = no_answer  # type: ignore[method-assign, assignment]
    worker._member().fetch = out_of_range  # type: ignore[method-assign, assignment]
    with pytest.raises(OutOfRange):
        worker.step()


def test_a_step_that_fails_after_its_fetch_skips_nothing(mill: Mill) -> None:
    """Seen to fail with the error left to the worker's life, which only steps again: 1 and 2 were skipped."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(grain: Grain) -> Flour:
        return Flour(n=grain.n)

    mill.pour([0])
    mill.run_to(1)
    worker = mill.worker
    assert worker is not None
    ask = worker._beginning.ask_topic

    def fails_once(_stream: object) -> Callable[[], None]:
        worker._beginning.ask_topic = ask  # type: ignore[method-assign]
        raise Retryable("no answer.")

    mill.pour([1, 2])
    worker._next_check = float("inf")
    worker._beginning.ask_topic = fails_once  # type: ignore[method-assign, assignment]
    mill.run_until(lambda: worker._beginning.ask_topic == ask)
    mill.pour([3])
    mill.run_to(4)
    assert mill.ground() == [0, 1, 2, 3]


class Told:
    """A client; once it is told that the group has thrown it out, it says so as one does that was frozen."""

    def __init__(self, client: Any) -> None:
        self._client, self.told = client, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def consumer_group_metadata(self) -> bytes:
        raw: bytes = self._client.consumer_group_metadata()
        told, self.told = self.told, False
        return raw[:7] + struct.pack("<i", -1) + raw[11:] if told else raw


def test_who_was_thrown_out_at_work_moves_nothing(mill: Mill) -> None:
    """By then a successor has done its work, and has left: Kafka takes offsets of generation -1 while nobody is there.

    Seen to fail (1 came out twice) with the metadata asked for when the offsets are sent.
    """
    # As short as the ladder of timeouts permits.
    short: dict[str, Any] = {
        "max_poll_interval": 6.0,
        "transform_transaction_timeout": 2.0,
        "transform_message_timeout": 1.0,
    }
    calls: list[int] = []

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(grain: Grain) -> Flour:
        calls.append(grain.n)
        if calls == [1]:
            mill.worker = None
            mill.run_to(1, **short)
            mill.stop()
            mill.worker, client.told = worker, True
        return Flour(n=grain.n)

    worker = mill.start(**short)
    client = Told(worker._member()._consumer)
    worker._member()._consumer = client  # type: ignore[assignment]
    mill.pour([1])
    mill.run_to(1)
    assert calls == [1, 1]
    mill.pour([2])
    mill.run_to(2, within=60)
    assert mill.ground() == [1, 2]


def test_slow_is_no_twin(mill: Mill, caplog: pytest.LogCaptureFixture) -> None:
    """Kafka fences a transaction that lasts too long, again and again. Seen to fail: stopped, and a twin was blamed."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(grain: Grain) -> Flour:
        return Flour(n=grain.n)

    worker = mill.start(instance="one")
    worker._pause = QUICK
    for _ in range(5):
        worker._running_since -= NEVER
        worker._doubt(worker._member(), Fenced("INVALID_PRODUCER_EPOCH."))
    mill.pour([1])
    mill.run_to(1)
    assert mill.ground() == [1]
    assert "raise EO_TRANSFORM_TRANSACTION_TIMEOUT, or make less of each" in caplog.text


def test_a_list_of_which_many_are_named(mill: Mill) -> None:
    """Seen to fail with RecursionError, which ended the process."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=Retry(attempts=1), breaker=None)
    def grind(batch: list[Grain]) -> list[Flour]:
        for index, grain in enumerate(batch):
            if grain.n > 0:
                raise BatchItemFailed(index) from ValueError("no")
        return [Flour(n=grain.n) for grain in batch]

    mill.pour([*range(490), 0])
    mill.run_to(491, within=60)
    assert (mill.ground(), len(mill.dead())) == ([0, 0], 489)


def test_a_list_that_the_function_empties(mill: Mill) -> None:
    """It is the function's to change. Seen to fail: what it had taken out was no longer known to have been there."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=Retry(attempts=1))
    def grind(batch: list[Grain]) -> list[Flour]:
        ground = []
        while batch:
            grain = batch.pop(0)
            if grain.n == 3:
                raise ValueError("no")
            ground.append(Flour(n=grain.n))
        return ground

    mill.pour(range(6))
    mill.run_to(6)
    assert (mill.ground(), mill.dead()) == ([0, 1, 2, 4, 5], [b'{"n":3}'])


def test_a_crash_is_still_a_crash(mill: Mill) -> None:
    """One that was charged, and whose process died: nobody takes that back."""
    alive = [False]

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=Retry(crashes=9))
    def grind(grain: Grain) -> Flour:
        if not alive[0]:
            raise SystemExit(1)
        return Flour(n=grain.n)

    mill.pour([1])
    for _ in range(5):
        mill.start()
        with pytest.raises(SystemExit):
            mill.run_to(1)
    assert mill.mark() == Mark(crashes=3, takeovers=5)
    alive[0] = True
    mill.start()
    mill.run_to(1)
    assert mill.ground() == [1]
