"""A client that finds no broker any more, while others do (kafka/contact.py): it is noticed, and another one goes on.

What librdkafka brings about when two of its threads meet is brought about here by clients that were told a wrong
address. The real thing, by chance: tests/cluster/test_lost_clients.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient

from eoframework import Message, clock
from eoframework.consume import worker as consuming
from eoframework.db.session import Database
from eoframework.errors import RestartNeeded, Retryable
from eoframework.kafka.admin import Admin
from eoframework.kafka.config import consumer_config
from eoframework.kafka.consumer import GroupConsumer
from eoframework.kafka.contact import Contact, has_lost_cluster
from eoframework.settings import Settings
from eoframework.transform import worker as transforming
from tests.consume.harness import make_app, running, worker_of
from tests.processes import eventually
from tests.transform.mill import Flour, Grain, Mill

NOBODY: dict[str, str | int | float | bool] = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}
QUICK: dict[str, str | int | float | bool] = {"socket.timeout.ms": 1000}


@pytest.fixture
def mill(settings: Settings) -> Iterator[Mill]:
    made = Mill(settings)
    yield made
    made.stop()


@pytest.mark.parametrize("module", [consuming, transforming], ids=["handler", "transform"])
def test_a_worker_whose_consumer_is_lost_ends_to_be_started_again(
    mill: Mill, database: Database, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail, each, without `contact.check` in its worker: it stood still, as if there were nothing to read."""

    def nowhere(*given: Any, **named: Any) -> dict[str, Any]:
        return consumer_config(*given, **named) | NOBODY | QUICK

    monkeypatch.setattr(module, "consumer_config", nowhere)
    monkeypatch.setattr(module, "_CHECK_SECONDS", 0.0)
    if module is consuming:
        app = make_app(mill.settings, database)
        app.handler(mill.grain, name="book")(never_booked)
        worker: Any = worker_of(app)
        worker.start()
    else:
        mill.app.transform(mill.grain, to=mill.flour, name="grind")(never_ground)
        worker = mill.start()
    try:
        with pytest.raises(RestartNeeded, match="has found no broker for"):
            eventually(worker.step, "it notices")
    finally:
        if module is consuming:
            worker.close()


def never_booked(message: Message[Grain]) -> None:
    raise AssertionError(f"nobody can have fetched {message}")


def never_ground(message: Message[Grain]) -> Flour:
    raise AssertionError(f"nobody can have fetched {message}")


class Moody:
    """A client that answers, or does not."""

    def __init__(self) -> None:
        self.answers = True

    def list_topics(self, topic: str | None = None, timeout: float = -1) -> None:
        if not self.answers:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))


def test_silence_that_a_frozen_broker_can_account_for_is_forgiven() -> None:
    """Seen to fail with the first unanswered question taken for the last, and with an answer that made nothing good."""
    client = Moody()
    contact = Contact(client, "a topic", {"socket.timeout.ms": 400})
    for _ in range(2):
        client.answers = False
        contact.check()
        clock.sleep(0.6)
        contact.check()
        client.answers = True
        contact.check()
    client.answers = False
    contact.check()
    clock.sleep(1.1)
    with pytest.raises(RestartNeeded):
        contact.check()


def test_a_producer_that_is_answered_or_alone_has_lost_nobody(settings: Settings, tmp_path: Path) -> None:
    """Seen to fail without the question to another client, and without its KafkaException."""
    here = {"bootstrap.servers": settings.require_bootstrap_servers()}
    sound, lost = AdminClient(here), AdminClient(NOBODY)
    assert not has_lost_cluster(sound, here)
    assert not has_lost_cluster(lost, dict(NOBODY)), "nobody is answered"
    assert not has_lost_cluster(lost, {**here, "security.protocol": "ssl", "ssl.key.location": str(tmp_path / "gone")})
    assert has_lost_cluster(lost, here)


def test_questions_are_asked_by_a_new_client(settings: Settings, topic_name: str) -> None:
    """Seen to fail without the client forgotten in `_look_around`: no question was answered any more."""
    admin = Admin(settings)
    admin._client_made = AdminClient(NOBODY)
    with pytest.raises(Retryable):
        admin.ask_topic_id(topic_name)()
    assert admin.watermarks(topic_name, 0) == (0, 0)


@pytest.mark.usefixtures("told_once")
def test_what_the_group_was_told_in_vain_is_told_again(settings: Settings, database: Database, mill: Mill) -> None:
    """In the campaign: lag shown for ever of what had long been done, after the coordinator had been away for a second.

    Seen to fail without the claims added to `_uncommitted` in `_keep_house`.
    """
    app = make_app(settings, database)
    app.handler(mill.grain, name="book")(booked)
    mill.pour(range(5))
    group = app.handlers[0].group
    with running(app):
        eventually(
            lambda: {p: at for p, (at, _) in mill.admin.group_offsets(group, mill.grain.name).items()} == {0: 5},
            "the group's offset is the position",
        )


def booked(message: Message[Grain]) -> None:
    """Nothing to do."""


@pytest.fixture
def told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The group hears nothing of the first word about each place, as when its coordinator is away."""
    monkeypatch.setattr(consuming, "_CHECK_SECONDS", 0.2)
    commit: Callable[..., None] = GroupConsumer.commit
    heard: set[object] = set()

    def deaf(self: GroupConsumer, offsets: Mapping[int, tuple[int, int]], *, wait: bool = False) -> None:
        known = {p: at for p, at in offsets.items() if (p, at) in heard}
        heard.update(offsets.items())
        if known:
            commit(self, known, wait=wait)

    monkeypatch.setattr(GroupConsumer, "commit", deaf)
