"""What a transform was to read is gone: it stops and says so, whether it runs meanwhile or starts afterwards.

As tests/consume/test_fail_closed.py for handlers; the error's class is the exit code 70 of `eo run`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka import TopicPartition

from eoframework.errors import FailClosed
from eoframework.settings import Settings
from tests.processes import eventually
from tests.transform.mill import Flour, Grain, Mill


@pytest.fixture
def mill(settings: Settings) -> Iterator[Mill]:
    made = Mill(settings)

    @made.app.transform(made.grain, to=made.flour, name="grind")
    def grind(grain: Grain) -> Flour:
        return Flour(n=grain.n)

    made.pour([0, 1, 2])
    yield made
    made.stop()


def refused(mill: Mill, **changes: Any) -> str:
    """The error that ends a worker, at its start or at its work; it has moved no offset."""
    before = mill.offsets()
    with pytest.raises(FailClosed) as found:
        mill.run_until(lambda: False, **changes)
    mill.stop()
    assert mill.offsets() == before
    return str(found.value)


def delete_records(mill: Mill, before: int) -> None:
    where = TopicPartition(mill.grain.name, 0, before)
    mill.admin._client.delete_records([where])[where].result(30)


def recreate(mill: Mill) -> None:
    mill.admin._client.delete_topics([mill.grain.name])[mill.grain.name].result(30)
    eventually(lambda: not mill.admin.existing([mill.grain.name]), "the topic is gone")
    mill.admin.create(mill.grain.name, partitions=1, replicas=1, config={})


def test_records_deleted_before_the_offset_are_nobodys_loss(mill: Mill) -> None:
    """What must not stop it, whether it runs or starts anew."""
    mill.run_to(3)
    delete_records(mill, 3)
    mill.pour([3])
    mill.run_to(4)
    mill.stop()
    mill.pour([4])
    mill.run_to(5)
    assert mill.ground() == [0, 1, 2, 3, 4]


def test_records_deleted_past_the_offset_while_stopped(mill: Mill) -> None:
    """Seen to fail with `_AUTO_OFFSET_RESET` out of `_LOG_IS_NOT_WHAT_IT_WAS` in kafka/consumer.py."""
    mill.run_to(3)
    mill.stop()
    mill.pour(range(3, 10))
    delete_records(mill, 6)
    said = refused(mill)
    assert f"eo position set {mill.group} 0 earliest" in said
    assert mill.ground() == [0, 1, 2]


def test_records_deleted_past_the_offset_while_running(mill: Mill) -> None:
    """Seen to fail as the one before."""
    mill.run_to(3, kafka={"fetch.message.max.bytes": "100", "queued.min.messages": "1"}, transform_batch=1)
    mill.pour(range(3, 40))
    delete_records(mill, 39)
    said = refused(mill)
    assert f"eo position set {mill.group} 0 earliest" in said
    assert mill.ground() == list(range(len(mill.ground())))
    assert 39 not in mill.ground()


def test_topic_recreated_while_stopped(mill: Mill) -> None:
    """Seen to fail without `refuse_moved` in transform/start.py."""
    mill.run_to(3)
    mill.stop()
    recreate(mill)
    mill.pour(range(10, 15))
    said = refused(mill)
    assert f"eo position forget {mill.group}" in said
    assert mill.ground() == [0, 1, 2]


@pytest.mark.parametrize("protocol", ["consumer", "classic"])
def test_topic_recreated_while_running(mill: Mill, protocol: str) -> None:
    """Seen to fail without `ask_same_topic` in transform/start.py."""
    changes: dict[str, Any] = {"group_protocol": protocol, "kafka": {"fetch.error.backoff.ms": "700"}}
    mill.run_to(3, **changes)
    recreate(mill)
    mill.pour(range(10, 15))
    said = refused(mill, **changes)
    assert f"eo position forget {mill.group}" in said
    assert mill.ground() == [0, 1, 2]


def test_topic_deleted_while_running(mill: Mill) -> None:
    """Seen to fail as the one before."""
    mill.run_to(3)
    mill.admin._client.delete_topics([mill.grain.name])[mill.grain.name].result(30)
    said = refused(mill)
    assert f"eo position forget {mill.group}" in said
