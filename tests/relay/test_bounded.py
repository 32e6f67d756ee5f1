"""Calls of the Kafka client that do not come back are given up; the others are as they were."""

from __future__ import annotations

import threading

import pytest
from confluent_kafka import KafkaError, KafkaException

from eoframework.kafka import bounded as module
from eoframework.kafka.bounded import NoReturn, bounded
from eoframework.kafka.faults import kafka_error


def test_a_call_that_never_returns_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to hang with the call made on the caller's own thread."""
    monkeypatch.setattr(module, "_GRACE", 0.05)
    forever = threading.Event()
    with pytest.raises(NoReturn) as raised:
        bounded(lambda _: forever.wait(), 0.05)
    assert kafka_error(raised.value).code() == KafkaError._TIMED_OUT
    forever.set()


def test_the_call_gets_the_timeout_and_tells_what_it_took() -> None:
    given: list[float] = []
    assert bounded(given.append, 7.5) < 7.5
    assert given == [7.5]


def test_what_the_call_raises_is_raised() -> None:
    def refuse(_: float) -> None:
        raise KafkaException(KafkaError(KafkaError.PRODUCER_FENCED))

    with pytest.raises(KafkaException) as raised:
        bounded(refuse, 1)
    assert not isinstance(raised.value, NoReturn)
    assert kafka_error(raised.value).code() == KafkaError.PRODUCER_FENCED
