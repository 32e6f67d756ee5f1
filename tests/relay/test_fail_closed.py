"""Database and Kafka contradict each other: the relay stops (exit 70), names the remedy, and deletes nothing."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient

from eoframework import clock
from eoframework.checkpoint import Checkpoint
from eoframework.errors import Retryable
from eoframework.kafka.admin import Admin
from eoframework.kafka.answers import UnknownTopic
from eoframework.kafka.checkpoint import CheckpointLog
from tests.conftest import Addresses, database_named
from tests.relay.rig import SHARDS, Rig, open_copy

STOPPED_TO_PROTECT_DATA = 70
CANNOT_START = 3
ANOTHER: dict[str, Any] = {
    "outbox_id": uuid.UUID(int=7),
    "cluster_id": "another",
    "topic_id": uuid.UUID(int=7),
    "shard": SHARDS,
}


def publish_and_drain(rig: Rig, count: int) -> None:
    rig.publish(count, keys=1)
    with rig.run_here(once=True) as relay:
        assert relay.ended() == 0


def test_checkpoint_topic_deleted(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    publish_and_drain(rig, 10)
    delete_topic(rig)
    rig.publish(10)
    with rig.run_here(once=True) as relay:
        assert relay.ended() == STOPPED_TO_PROTECT_DATA
    assert rig.left() == 10
    assert "is gone" in caplog.text
    assert "eo outbox adopt" in caplog.text


def test_checkpoint_topic_deleted_and_made_again(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Seen to fail (exit 0: it went on from an empty topic) with the comparison of topic ids and the one of `batch_no`

    in `_first_use` removed (relay/recovery.py).
    """
    publish_and_drain(rig, 10)
    delete_topic(rig)
    rig.make_checkpoint_topic()
    rig.publish(10)
    with rig.run_here(once=True) as relay:
        assert relay.ended() == STOPPED_TO_PROTECT_DATA
    assert rig.left() == 10
    assert "made again" in caplog.text


def test_checkpoint_topic_emptied(rig: Rig) -> None:
    """As above, had the topic kept its id: a truncated log."""
    publish_and_drain(rig, 10)
    rig.sql("UPDATE eo.relay_shard SET checkpoint_topic_id = NULL, cluster_id = NULL")
    delete_topic(rig)
    rig.make_checkpoint_topic()
    rig.publish(10, keys=1)
    with rig.run_here() as relay:
        assert relay.ended() == STOPPED_TO_PROTECT_DATA
    assert rig.left() == 10


def test_the_way_out_that_the_error_names_works(rig: Rig) -> None:
    publish_and_drain(rig, 10)
    delete_topic(rig)
    rig.make_checkpoint_topic()
    rig.sql("UPDATE eo.relay_shard SET batch_no = 0, cluster_id = NULL, checkpoint_topic_id = NULL")
    publish_and_drain(rig, 10)
    assert len(rig.read()) == 20


def test_another_cluster(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    publish_and_drain(rig, 10)
    rig.sql("UPDATE eo.relay_shard SET cluster_id = 'elsewhere' WHERE cluster_id IS NOT NULL")
    rig.publish(10)
    with rig.run_here() as relay:
        assert relay.ended() == STOPPED_TO_PROTECT_DATA
    assert rig.left() == 10
    assert "EO_KAFKA_BOOTSTRAP_SERVERS" in caplog.text


@pytest.mark.parametrize("of", ANOTHER)
def test_a_checkpoint_that_was_copied_there(rig: Rig, of: str, caplog: pytest.LogCaptureFixture) -> None:
    """By a mirror, or with a restored topic: of what this cluster has been sent it says nothing, also where its number
    fits. Seen to fail (exit 0: it went on) with the comparison taken out of `_belongs` (relay/recovery.py).
    """
    publish_and_drain(rig, 10)
    ((shard,),) = rig.sql("SELECT shard FROM eo.relay_shard WHERE batch_no > 0")
    last = CheckpointLog(rig.settings, Admin(rig.settings), rig.outbox_id).last(int(str(shard)))
    assert last is not None
    copied = replace(last, **{of: ANOTHER[of]})
    producer = Producer({"bootstrap.servers": rig.settings.require_bootstrap_servers()})
    producer.produce(rig.checkpoint_topic, copied.encode(), key=str(shard).encode(), partition=last.shard)
    assert producer.flush(30) == 0
    rig.publish(10, keys=1)
    with rig.run_here(once=True) as relay:
        assert relay.ended() == STOPPED_TO_PROTECT_DATA
    assert rig.left() == 10
    assert "was copied there" in caplog.text


def test_never_made_checkpoint_topic_names_the_command(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    delete_topic(rig)
    with rig.run_here() as relay:
        assert relay.ended() == CANNOT_START
    assert "eo topics apply" in caplog.text


def test_checkpoint_topic_that_would_forget(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    Admin(rig.settings).set_config(rig.checkpoint_topic, {"cleanup.policy": "delete"})
    with rig.run_here() as relay:
        assert relay.ended() == CANNOT_START
    assert "cleanup.policy=compact" in caplog.text


def test_database_restored_to_an_older_state(
    rig: Rig, services: Addresses, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The restored database gives the published numbers to other rows; only the digest tells.

    Seen to fail (exit 0, 50 rows deleted that were never published) with the comparison of digests removed
    (db/pending.py `remove_published`).
    """
    publish_and_drain(rig, 50)
    rig.database.engine.dispose()
    source = database_url.rsplit("/", 1)[1].split("?")[0]
    with database_named(services, f"eo_old_{uuid.uuid4().hex[:8]}", source=source) as backup:
        publish_and_drain(rig, 50)
        with open_copy(rig, backup) as restored:
            restored.publish(50, keys=1)
            with restored.run_here(once=True) as relay:
                assert relay.ended() == STOPPED_TO_PROTECT_DATA
            assert restored.left() == 50
    assert "restored" in caplog.text


def test_database_restored_far_back(
    rig: Rig, services: Addresses, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig.database.engine.dispose()
    source = database_url.rsplit("/", 1)[1].split("?")[0]
    with database_named(services, f"eo_old_{uuid.uuid4().hex[:8]}", source=source) as backup:
        publish_and_drain(rig, 5)
        publish_and_drain(rig, 5)
        with open_copy(rig, backup) as restored:
            restored.publish(5, keys=1)
            with restored.run_here() as relay:
                assert relay.ended() == STOPPED_TO_PROTECT_DATA
            assert restored.left() == 5
    assert "Kafka's last batch is 2, the database's is 0" in caplog.text


def test_no_shard_sends_beside_one_that_was_set_back(
    rig: Rig, services: Addresses, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard would find out for itself, and the others send meanwhile.

    Seen to fail (most of them sent what they had) with nothing refused by `refuse_set_back` (relay/recovery.py).
    """
    rig.database.engine.dispose()
    source = database_url.rsplit("/", 1)[1].split("?")[0]
    with database_named(services, f"eo_old_{uuid.uuid4().hex[:8]}", source=source) as backup:
        publish_and_drain(rig, 5)
        ((behind,),) = rig.sql("SELECT shard FROM eo.relay_shard WHERE batch_no > 0")
        last = CheckpointLog.last

        def late(self: CheckpointLog, shard: int) -> Checkpoint | None:
            if shard == behind:
                clock.sleep(5)
            return last(self, shard)

        monkeypatch.setattr(CheckpointLog, "last", late)
        with open_copy(rig, backup) as restored:
            restored.publish(40)
            with restored.run_here() as relay:
                assert relay.ended() == STOPPED_TO_PROTECT_DATA
            assert restored.left() == 40
            assert len(restored.read()) == 5


def test_published_rows_deleted_by_hand(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Seen to fail (exit 0) with the count of deleted rows not compared (db/pending.py `_delete`) and no digest."""
    rig.publish(20, keys=1)
    victim = rig.start(die_at="kafka.transaction.committed")
    assert victim.wait() < 0
    rig.sql("DELETE FROM eo.outbox_message WHERE seq IN (SELECT seq FROM eo.outbox_message LIMIT 3)")
    with rig.run_here() as relay:
        assert relay.ended() == STOPPED_TO_PROTECT_DATA
    assert rig.left() == 17
    assert "eo outbox adopt" in caplog.text


def test_a_lagging_replica_is_not_taken_for_the_end_of_the_checkpoints(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail with `return last` at the end-of-partition in CheckpointLog._last_between: an older checkpoint, or
    none, was taken for the last, and the batch behind it would have been sent again.
    """
    publish_and_drain(rig, 5)
    log = CheckpointLog(rig.settings, Admin(rig.settings), rig.outbox_id)
    leader_says = CheckpointLog._range

    def further_on(self: CheckpointLog, consumer: Consumer, shard: int) -> tuple[int, int]:
        low, high = leader_says(self, consumer, shard)
        return low, high + 2

    monkeypatch.setattr(CheckpointLog, "_range", further_on)
    monkeypatch.setattr("eoframework.kafka.checkpoint._TIMEOUT", 1.0)
    for shard in range(SHARDS):
        with pytest.raises(Retryable):
            log.last(shard)


def delete_topic(rig: Rig) -> None:
    client = AdminClient({"bootstrap.servers": rig.settings.require_bootstrap_servers()})
    client.delete_topics([rig.checkpoint_topic], operation_timeout=10)[rig.checkpoint_topic].result(10)
    rig.wait_for(lambda: is_gone(rig), what="the topic to be gone")


def is_gone(rig: Rig) -> bool:
    try:
        Admin(rig.settings).describe(rig.checkpoint_topic)
    except UnknownTopic:
        return True
    return False
