"""What our only broker says while it is cut off from its controller, again and again: that there are no brokers."""

from __future__ import annotations

import threading
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # its stubs do not re-export

from eoframework import clock, dev
from eoframework.errors import EoError
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.processes import eventually

CLIENTS = 24
TOPICS = 150
SECONDS = 45.0
# Its lease at the controller runs out for a second or two before each heartbeat.
FORGETFUL = {"broker.heartbeat.interval.ms": "3500", "broker.session.timeout.ms": "2000"}


def ask_on(admin: Admin, topic: str, until: float) -> None:
    while clock.monotonic() < until:
        # All topics: the more there are, the longer the client has its answer in hand, which is when it goes wrong.
        with suppress(KafkaException):
            admin._client.list_topics(timeout=1)
        answers(admin, topic)


@pytest.mark.timeout(400)
def test_clients_that_have_lost_their_cluster_are_replaced(tmp_path: Path) -> None:
    """Seen to fail without the client forgotten in Admin._look_around: some of the 24 had no answer any more, ever."""
    topics = [uuid.uuid4().hex[:8] for _ in range(TOPICS)]
    with dev.start(tmp_path / ".eo") as sound:
        made = AdminClient({"bootstrap.servers": sound.bootstrap_servers})
        for future in made.create_topics([NewTopic(topic, 4, 1) for topic in topics]).values():
            future.result(30)
    with dev.start(tmp_path / ".eo", kafka=dev.KafkaOptions(properties=FORGETFUL)) as services:
        settings = Settings.load(kafka_bootstrap_servers=services.bootstrap_servers)
        admins = [Admin(settings) for _ in range(CLIENTS)]
        until = clock.monotonic() + SECONDS
        asking = [threading.Thread(target=ask_on, args=(admin, topics[0], until)) for admin in admins]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        for admin in admins:
            eventually(partial(answers, admin, topics[0]), "an answer", seconds=20)


def answers(admin: Admin, topic: str) -> bool:
    with suppress(EoError):
        admin.ask_topic_id(topic)()
        return True
    return False
