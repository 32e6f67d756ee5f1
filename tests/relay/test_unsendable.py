"""Rows that cannot be sent: only what fails alone is set aside, with its cause; everything else flows, in order."""

from __future__ import annotations

import uuid

import pytest

from eoframework.kafka.admin import Admin
from tests.conftest import MakeTopic
from tests.relay.rig import Rig


def dead(rig: Rig) -> list[tuple[object, ...]]:
    return rig.sql("SELECT message_id, cause FROM eo.dead_letter ORDER BY id")


def test_one_large_row_among_small_ones(rig: Rig, make_topic: MakeTopic) -> None:
    """Seen to fail (31 of 31 in the dead letters) with `elif len(rows) > 1` in relay/relay.py `_set_aside` removed."""
    narrow = make_topic("narrow", config={"max.message.bytes": "4000"})
    small = rig.publish(15, topic=narrow, keys=3)
    (large,) = rig.publish(1, topic=narrow, keys=3, size=20_000)
    small += rig.publish(15, topic=narrow, keys=3)
    others = rig.publish(50)
    with rig.run_here(once=True) as relay:
        assert relay.ended() == 0
    rig.assert_published(small, narrow)
    rig.assert_published(others)
    ((message_id, cause),) = dead(rig)
    assert message_id == large.id
    assert "MSG_SIZE_TOO_LARGE" in str(cause)


def test_good_rows_that_are_too_large_together(
    rig: Rig, make_topic: MakeTopic, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests stay below the topic's limit. Seen to fail (batches refused and halved) without `limit_request`."""
    narrow = make_topic("narrow", config={"max.message.bytes": "4000"})
    messages = rig.publish(200, topic=narrow, keys=3, size=500)
    caplog.set_level("INFO")
    with rig.run_here(once=True) as relay:
        assert relay.ended() == 0
    rig.assert_published(messages, narrow)
    assert dead(rig) == []
    assert "aborted" not in caplog.text


def test_larger_than_the_client_sends_at_all(rig: Rig) -> None:
    before = rig.publish(10)
    (large,) = rig.publish(1, size=1_500_000)
    after = rig.publish(10)
    with rig.run_here(once=True) as relay:
        assert relay.ended() == 0
    rig.assert_published(before + after)
    assert [row[0] for row in dead(rig)] == [large.id]


def test_unknown_topic_waits_for_its_topic_and_others_flow(rig: Rig) -> None:
    """Seen to fail (nothing flows for 30 s) with `limit` in relay/topics.py not asking Kafka first."""
    missing = f"missing.{uuid.uuid4().hex[:8]}"
    waiting = rig.publish(20, topic=missing)
    flowing = rig.publish(50)
    with rig.run_here():
        rig.wait_for(lambda: rig.left() == 20, what="the other topic's rows")
        rig.assert_published(flowing)
        Admin(rig.settings).create(missing, partitions=1, replicas=1, config={})
        rig.wait_empty()
    rig.assert_published(waiting, missing)
    assert dead(rig) == []


def test_once_leaves_the_rows_of_an_unknown_topic_and_says_so(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    missing = f"missing.{uuid.uuid4().hex[:8]}"
    rig.publish(5, topic=missing)
    with rig.run_here(once=True) as relay:
        assert relay.ended() == 0
    assert rig.left() == 5
    assert f"stay in the outbox: {missing}" in caplog.text


def test_a_name_that_no_topic_can_have(rig: Rig) -> None:
    rig.publish(5, topic="not a topic!")
    flowing = rig.publish(20)
    with rig.run_here():
        rig.wait_for(lambda: rig.left() == 5, what="the other topic's rows")
    rig.assert_published(flowing)
    assert dead(rig) == []
