"""Messages that the function fails on: held in their place, or given up inside the same Kafka transaction."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from eoframework import Breaker, Message, Out, Reject, Retry, RetryLater, clock
from eoframework.errors import Abortable, BatchItemFailed, FailClosed, HandlerFailed
from eoframework.kafka.transaction import TransactionalProducer
from eoframework.retry import fixed
from eoframework.settings import Settings
from tests.consume.unreadable import produce_with_header_name
from tests.transform.mill import NEVER, Flour, Grain, Mill

SOON = Retry(attempts=3, backoff=fixed(0.05), jitter=0)
ONCE = Retry(attempts=1)


@pytest.fixture
def mill(settings: Settings) -> Iterator[Mill]:
    made = Mill(settings, partitions=2)
    yield made
    made.stop()


def producer_of(mill: Mill) -> TransactionalProducer:
    assert mill.worker is not None
    assert mill.worker._producer is not None
    return mill.worker._producer


def grinding(
    mill: Mill, broken: dict[int, Exception], *, retry: Retry | None = SOON, breaker: Breaker | None = None
) -> list[tuple[int, int]]:
    """Declare the transform; returns the list of its calls as (number, attempt)."""
    calls: list[tuple[int, int]] = []

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=retry, breaker=breaker)
    def grind(message: Message[Grain]) -> Flour:
        calls.append((message.payload.n, message.attempt))
        if message.payload.n in broken:
            raise broken[message.payload.n]
        return Flour(n=message.payload.n)

    return calls


def noise(size: int) -> str:
    """Text that compression makes little of."""
    return secrets.token_hex(size // 2)


def test_a_failing_message_holds_its_partition_and_no_other(mill: Mill) -> None:
    """Seen to fail without `consumer.pause` in `_hold`: 4, which came later, came out before 2, and 2 never did."""
    grinding(mill, {2: ValueError("no")}, retry=Retry(attempts=9, backoff=fixed(NEVER)))
    mill.pour([1, 2, 3])
    mill.pour([10, 11, 12], partition=1)
    mill.run_to(3, partition=1)
    mill.run_to(1)
    assert mill.ground() == [1, 10, 11, 12]
    assert mill.mark().attempts == 1
    mill.pour([4])
    mill.pour([13], partition=1)
    mill.run_to(4, partition=1)
    deadline = clock.monotonic() + 2
    mill.run_until(lambda: clock.monotonic() > deadline)
    assert mill.ground() == [1, 10, 11, 12, 13]
    assert mill.offset() == 1


def test_it_is_tried_again_in_its_place(mill: Mill) -> None:
    """Seen to fail without `consumer.start` in `_retry_waiting`: the partition stayed paused."""
    broken: dict[int, Exception] = {2: ValueError("no")}
    calls = grinding(mill, broken)
    mill.pour([1, 2, 3])
    mill.run_until(lambda: (2, 2) in calls)
    broken.clear()
    mill.run_to(3)
    assert mill.ground() == [1, 2, 3]
    assert [call for call in calls if call[0] == 2] == [(2, 1), (2, 2), (2, 3)]
    assert mill.mark() == type(mill.mark())()


def test_attempts_outlive_the_process(mill: Mill) -> None:
    """Seen to fail with the mark left out of the committed offset: the new worker began at attempt 1 again."""
    calls = grinding(mill, {2: ValueError("no")}, retry=Retry(attempts=3, backoff=fixed(0.3)))
    mill.pour([1, 2])
    mill.run_until(lambda: (2, 2) in calls and mill.mark().attempts == 2)
    mill.start()
    mill.run_to(2)
    assert [attempt for n, attempt in calls if n == 2] == [1, 2, 3]
    assert mill.dead() == [b'{"n":2}']


def test_the_dead_letter_is_part_of_the_same_transaction(mill: Mill) -> None:
    """Its offset, its neighbours' outputs and the dead letter: seen to fail with the letter sent after the commit."""
    grinding(mill, {2: ValueError("no")}, retry=ONCE)
    mill.pour([0])
    mill.run_to(1)
    assert mill.worker is not None

    def fails() -> None:
        raise FailClosed("before the commit")

    producer_of(mill).commit = fails  # type: ignore[method-assign]
    mill.pour([1, 2, 3])
    with pytest.raises(FailClosed):
        mill.run_to(4)
    assert (mill.dead(), mill.ground(), mill.offset()) == ([], [0], 1)
    assert [m.value() for m in mill.read(mill.letters, isolation="read_uncommitted")] == [b'{"n":2}']
    mill.start()
    mill.run_to(4)
    assert mill.dead() == [b'{"n":2}']
    assert mill.ground() == [0, 1, 3]
    assert mill.mark().deaths == 0


def test_the_dead_letter_tells_its_story(mill: Mill) -> None:
    grinding(mill, {2: ValueError("no")}, retry=ONCE)
    mill.pour([2])
    mill.run_to(1)
    (letter,) = mill.read(mill.letters)
    headers = dict(letter.headers() or ())
    assert letter.key() == b"k"
    assert headers["eo-dlt-consumer"] == mill.group.encode()
    assert headers["eo-dlt-topic"] == mill.grain.name.encode()
    assert (headers["eo-dlt-partition"], headers["eo-dlt-offset"], headers["eo-dlt-attempts"]) == (b"0", b"0", b"1")
    assert b"ValueError in test_failing.py:grind" in (headers["eo-dlt-cause"] or b"")


def test_what_cannot_be_decoded_dies_at_once(mill: Mill) -> None:
    calls = grinding(mill, {})
    mill.pour([1])
    mill.pour_raw([b"{"])
    mill.pour([3])
    mill.run_to(3)
    assert (mill.ground(), mill.dead(), [n for n, _ in calls]) == ([1, 3], [b"{"], [1, 3])


def test_reject_and_retry_later(mill: Mill) -> None:
    broken: dict[int, Exception] = {1: Reject("never"), 2: RetryLater(after=0.01)}
    calls = grinding(mill, broken)
    mill.pour([1, 2, 3])
    mill.run_until(lambda: (2, 2) in calls)
    broken.clear()
    mill.run_to(3)
    assert (mill.ground(), mill.dead()) == ([2, 3], [b'{"n":1}'])


def test_without_retry_it_stops_there(mill: Mill) -> None:
    """What precedes is committed first: seen to fail when the error was raised from within the transaction."""
    grinding(mill, {2: ValueError("no")}, retry=None)
    mill.pour([1, 2, 3])
    with pytest.raises(HandlerFailed, match=r"grind failed at grain\..*\[0\]@1: ValueError: no\."):
        mill.run_to(3)
    assert (mill.ground(), mill.offset()) == ([1], 1)
    assert mill.dead() == []


def test_the_breaker_stops_before_a_topic_is_emptied_into_the_dead_letters(mill: Mill) -> None:
    """Deaths in a row are counted over restarts: seen to fail with `deaths` left out of the mark."""
    broken: dict[int, Exception] = {n: ValueError("no") for n in range(1, 20)}
    grinding(mill, broken, retry=ONCE, breaker=Breaker(run=5))
    mill.pour([0, *range(1, 4)])
    mill.run_to(4)
    assert mill.mark().deaths == 3
    mill.stop()
    mill.pour(range(4, 20))
    with pytest.raises(FailClosed, match=r"6 messages in a row would be dead \(limit 5\)"):
        mill.run_to(20)
    assert len(mill.dead()) <= 5
    broken.clear()
    mill.start()
    mill.run_to(20)
    assert sorted(mill.ground() + [int((value or b"")[5:-1]) for value in mill.dead()]) == list(range(20))


def test_a_list_is_halved_until_the_culprit_is_alone(mill: Mill) -> None:
    """Seen to fail without halving: the whole list was given up."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=ONCE)
    def grind(batch: list[Grain]) -> list[Flour]:
        if any(one.n in (4, 9) for one in batch):
            raise ValueError("no")
        return [Flour(n=one.n) for one in batch]

    mill.pour(range(12))
    mill.run_to(12)
    assert mill.ground() == [n for n in range(12) if n not in (4, 9)]
    assert mill.dead() == [b'{"n":4}', b'{"n":9}']


def test_a_list_may_name_its_culprit(mill: Mill) -> None:
    calls: list[int] = []

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=ONCE)
    def grind(batch: list[Grain]) -> list[Flour]:
        calls.append(len(batch))
        for index, one in enumerate(batch):
            if one.n == 4:
                raise BatchItemFailed(index) from KeyError("four")
        return [Flour(n=one.n) for one in batch]

    mill.pour(range(12))
    mill.run_to(12)
    assert mill.ground() == [n for n in range(12) if n != 4]
    assert calls == [12, 11]
    (letter,) = mill.read(mill.letters)
    assert b"KeyError" in (dict(letter.headers() or ())["eo-dlt-cause"] or b"")


def test_an_output_that_kafka_refuses_kills_its_input_alone(settings: Settings) -> None:
    """Seen to fail without the search for the one to blame: innocents of its request died with it."""
    mill = Mill(settings, config={"max.message.bytes": "2000"})
    sent: list[int] = []

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=SOON)
    def grind(grain: Grain) -> Flour:
        sent.append(grain.n)
        return Flour(n=grain.n, text=noise(5000 if grain.n == 7 else 10))

    mill.pour(range(12))
    mill.run_to(12)
    mill.stop()
    assert mill.ground() == [n for n in range(12) if n != 7]
    (letter,) = mill.read(mill.letters)
    headers = dict(letter.headers() or ())
    assert letter.value() == b'{"n":7}'
    assert b"Kafka refuses what the transform makes of it" in (headers["eo-dlt-cause"] or b"")


def test_a_dead_letter_that_is_refused_too_stops_everything(settings: Settings) -> None:
    mill = Mill(settings, config={"max.message.bytes": "500"})
    mill.admin.set_config(mill.letters, {"max.message.bytes": "200"})

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=SOON)
    def grind(grain: Grain) -> Flour:
        return Flour(n=grain.n, text=noise(3000))

    mill.pour([1])
    with pytest.raises(FailClosed, match=r"refuses its dead letter too.*Raise max.message.bytes of .*\.dlt"):
        mill.run_to(1)
    mill.stop()
    assert (mill.offset(), mill.dead(), mill.ground()) == (0, [], [])


def test_a_missing_target_is_waited_for(mill: Mill) -> None:
    """Not given up: no message is to blame. Seen to fail with topic trouble taken for the record's."""
    other = type(mill.flour)(f"{mill.flour.name}.other", Flour)
    mill.admin.create(other.name, partitions=1, replicas=1, config={})

    @mill.app.transform(mill.grain, to={mill.flour, other}, name="grind", retry=ONCE)
    def grind(grain: Grain) -> Out[Flour]:
        return Out(other, Flour(n=grain.n))

    mill.start()
    mill.admin._client.delete_topics([other.name])[other.name].result()
    mill.pour([1, 2])
    deadline = 8
    worker = mill.worker
    assert worker is not None
    for _ in range(deadline):
        worker.step()
    assert mill.dead() == []
    mill.admin.create(other.name, partitions=1, replicas=1, config={})
    mill.run_to(2, within=60)
    assert [m.value() for m in mill.read(other.name)] == [b'{"n":1,"text":""}', b'{"n":2,"text":""}']


def test_a_list_that_names_nobody_is_halved(mill: Mill) -> None:
    """An index that is none: seen to fail by calling the function for ever."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=ONCE)
    def grind(batch: list[Grain]) -> list[Flour]:
        if any(one.n == 2 for one in batch):
            raise BatchItemFailed(99)
        return [Flour(n=one.n) for one in batch]

    mill.pour(range(4))
    mill.run_to(4)
    assert (mill.ground(), mill.dead()) == ([0, 1, 3], [b'{"n":2}'])


def test_a_list_with_too_few_results_stops_everything(mill: Mill) -> None:
    """Which of them are missing nobody knows. Seen to fail while it counted as a failure: innocents died."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", retry=ONCE)
    def grind(batch: list[Grain]) -> list[Flour]:
        return [Flour(n=one.n) for one in batch if one.n != 2]

    mill.pour(range(4))
    with pytest.raises(FailClosed, match=r"returned 3 results for 4 messages.*one entry for each message"):
        mill.run_to(4)
    assert (mill.offset(), mill.ground(), mill.dead()) == (0, [], [])


def test_a_doubt_elsewhere_does_not_shorten_the_pause(mill: Mill) -> None:
    """Seen to fail with `_retry_at` cleared in `_doubt`: the message was tried again at once."""
    calls = grinding(mill, {2: ValueError("no")}, retry=Retry(attempts=9, backoff=fixed(NEVER)))
    mill.pour([1, 2, 3])
    mill.run_to(1)
    assert mill.worker is not None
    producer = producer_of(mill)
    producer.send_offsets = _refuses_once(producer.send_offsets)  # type: ignore[method-assign]
    mill.pour([10, 11], partition=1)
    mill.run_to(2, partition=1)
    assert mill.ground() == [1, 10, 11]
    assert [call for call in calls if call[0] == 2] == [(2, 1)]


def _refuses_once(real: Callable[..., None]) -> Callable[..., None]:
    refused: list[bool] = []

    def send_offsets(*given: Any) -> None:
        if not refused:
            refused.append(True)
            raise Abortable("the group has a new generation")
        real(*given)

    return send_offsets


def test_a_member_that_is_refused_while_it_takes_over_goes_on(mill: Mill) -> None:
    """Its offsets are refused like those of any batch. Seen to end the worker without Abortable in DOUBTFUL."""
    grinding(mill, {})
    mill.pour([1, 2])
    mill.run_to(2)
    mill.start()
    assert mill.worker is not None
    producer = producer_of(mill)
    producer.send_offsets = _refuses_once(producer.send_offsets)  # type: ignore[method-assign]
    mill.pour([3])
    mill.run_to(3)
    assert mill.ground() == [1, 2, 3]


def one(grain: Grain) -> Flour:
    return Flour(n=grain.n)


def many(batch: list[Grain]) -> list[Flour]:
    return [Flour(n=grain.n) for grain in batch]


@pytest.mark.parametrize("function", [one, many])
def test_a_record_that_can_be_read_only_once(function: Any, mill: Mill) -> None:
    """A header name that is not UTF-8. Seen to fail with the record made anew for the dead letter: the client hands out
    null pointers the second time, and the process ends with SIGSEGV.
    """
    mill.app.transform(mill.grain, to=mill.flour, name="grind")(function)
    mill.pour([1])
    servers = mill.settings.require_bootstrap_servers()
    produce_with_header_name(servers, mill.grain.name, b'{"n": 2}', b"\xff\xfe")
    mill.run_until(lambda: len(mill.ground()) == 1 and len(mill.dead()) == 1)
