"""A client that finds no broker any more, while others do (kafka/contact.py): it is noticed, and another one goes on.

What librdkafka brings about when two of its threads meet is brought about here by clients that were told a wrong
address. The real thing, by chance: tests/cluster/test_lost_clients.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
from confluent_kafka.admin import AdminClient

from eoframework import Message
from eoframework.consume import worker as consuming
from eoframework.db.session import Database
from eoframework.errors import RestartNeeded, Retryable
from eoframework.kafka.admin import Admin
from eoframework.kafka.config import consumer_config
from eoframework.kafka.consumer import GroupConsumer
from eoframework.settings import Settings
from eoframework.transform import worker as transforming
from tests.consume.harness import make_app, running, worker_of
from tests.processes import eventually
from tests.transform.mill import Flour, Grain, Mill

NOBODY: dict[str, str | int | float | bool] = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}


@pytest.fixture
def mill(settings: Settings) -> Iterator[Mill]:
    made = Mill(settings)
    yield made
    made.stop()


@pytest.mark.parametrize("module", [consuming, transforming], ids=["handler", "transform"])
def test_a_worker_whose_consumer_is_lost_ends_to_be_started_again(
    mill: Mill, database: Database, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail, each, without `contact.look` in its worker: it stood still, as if there were nothing to read."""

    def nowhere(*given: Any, **named: Any) -> dict[str, Any]:
        return consumer_config(*given, **named) | NOBODY

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
    with pytest.raises(RestartNeeded, match="finds no broker any more, while others do"):
        eventually(worker.step, "it notices")
    if module is consuming:
        worker.close()


def never_booked(message: Message[Grain]) -> None:
    raise AssertionError(f"nobody can have fetched {message}")


def never_ground(message: Message[Grain]) -> Flour:
    raise AssertionError(f"nobody can have fetched {message}")


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
