"""Where a log begins and ends, as Kafka tells it. While brokers die: tests/cluster/test_brokers.py."""

from __future__ import annotations

import uuid

import pytest
from confluent_kafka import Producer

from eoframework.kafka.admin import Admin
from eoframework.kafka.answers import UnknownTopic
from eoframework.settings import Settings


def test_the_ends_of_a_log(settings: Settings, topic_name: str) -> None:
    admin = Admin(settings)
    assert admin.watermarks(topic_name, 0) == (0, 0)
    producer = Producer({"bootstrap.servers": settings.require_bootstrap_servers()})
    producer.produce(topic_name, b"1")
    producer.flush()
    assert admin.watermarks(topic_name, 0) == (0, 1)


def test_a_topic_that_is_not_there_is_named(settings: Settings) -> None:
    """For the question for the ends it only has no leaders. Seen to fail without the one for its id."""
    missing = f"missing.{uuid.uuid4().hex[:8]}"
    with pytest.raises(UnknownTopic, match=f"no topic '{missing}'"):
        Admin(settings).watermarks(missing, 0)
