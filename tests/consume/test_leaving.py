"""A member that leaves is given a partition while it says goodbye: whoever claims it then leaves a claim behind."""

from __future__ import annotations

import uuid
from collections.abc import Callable

from confluent_kafka.admin import AdminClient

from eoframework.kafka.config import consumer_config
from eoframework.kafka.consumer import GroupConsumer
from eoframework.settings import Settings
from tests.conftest import MakeTopic
from tests.processes import eventually


class Member:
    """A member of the group; it notes what it was given."""

    def __init__(self, settings: Settings, topic: str, group: str, name: str) -> None:
        self.given: list[list[int]] = []
        config = consumer_config(settings, group=group, client_id=name)
        self.consumer = GroupConsumer(config, topic, on_assigned=self._assigned, on_revoked=lambda _: None)

    def _assigned(self, partitions: list[int]) -> dict[int, int | None]:
        if partitions:
            self.given.append(sorted(partitions))
        return dict.fromkeys(partitions, 0)


def told_partitions(settings: Settings, group: str, name: str) -> Callable[[], int]:
    """How many partitions the broker has told this member of."""
    client = AdminClient({"bootstrap.servers": settings.require_bootstrap_servers()})

    def ask() -> int:
        members = client.describe_consumer_groups([group])[group].result(10).members
        return sum(len(m.assignment.topic_partitions) for m in members if m.client_id == name)

    return ask


def test_what_it_is_given_while_it_leaves_is_not_claimed(settings: Settings, make_topic: MakeTopic) -> None:
    """Found by the full campaign: a claim of a process that had ended well, so that its successor was as careful as
    after a crash. Seen to fail without `_leaving` in GroupConsumer._assigned.
    """
    topic, group = make_topic(partitions=2), f"leaving-{uuid.uuid4().hex[:8]}"
    first, last = (Member(settings, topic, group, name) for name in ("first", "last"))

    def shared() -> bool:
        for member in (first, last):
            member.consumer.fetch(1, 0.1)
        return len(first.consumer.assigned()) == len(last.consumer.assigned()) == 1

    eventually(shared, "each has one of the two", seconds=40)
    before = list(last.given)
    first.consumer.close({})
    told = told_partitions(settings, group, "last")
    eventually(lambda: told() == 2, "the broker gives it the other one, too", seconds=40)
    last.consumer.close({})
    assert last.given == before
