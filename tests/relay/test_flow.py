"""What the relay does when nothing goes wrong."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import text

from eoframework import clock
from eoframework.cloudevents import incoming_id
from eoframework.message import OutboxMessage
from tests.relay.rig import Rig, by_key, raw_records


def test_every_row_once_in_order_per_key_and_once_ends(rig: Rig) -> None:
    messages = rig.publish(500)
    relay = rig.start(once=True)
    assert relay.wait() == 0, relay.log()
    assert rig.left() == 0
    rig.assert_published(messages)


def test_once_with_nothing_to_do_ends_at_once(rig: Rig) -> None:
    with rig.run_here(once=True) as relay:
        assert relay.ended() == 0


def test_a_record_carries_what_was_published(rig: Rig) -> None:
    message = OutboxMessage(
        id=rig.message(key="k").id,
        topic=rig.topic,
        key=b"\xff\x00key",
        payload=None,
        type="order.placed",
        source="shop",
        content_type="application/json",
        headers=(("plain", b"text"), ("bytes", b"\xff\xfe"), ("none", None), ("plain", b"again")),
    )
    with rig.database.begin("test") as connection:
        rig.insert(connection, [message])
    with rig.run_here(once=True) as relay:
        assert relay.ended() == 0
    (record,) = raw_records(rig.settings, rig.topic)
    headers = list(record.headers() or [])
    assert (record.key(), record.value()) == (b"\xff\x00key", None)
    assert headers[-4:] == [("plain", b"text"), ("bytes", b"\xff\xfe"), ("none", None), ("plain", b"again")]
    assert dict(headers)["ce_type"] == b"order.placed"
    assert incoming_id(tuple(headers), topic=rig.topic) == message.id


def test_lower_number_committed_later_is_published_too(rig: Rig) -> None:
    """Rows are chosen by state. Seen to fail (1 never published) with `AND seq > <last seq sent>` in the select."""
    with rig.run_here():
        with rig.database.engine.connect() as slow:
            late = rig.message(key=None)
            rig.insert(slow, [late])
            early = rig.publish(20)
            rig.wait_for(lambda: len(rig.read()) == 20, what="the higher numbers to be published")
            slow.commit()
        rig.wait_empty()
    rig.assert_published([late, *early])


def test_a_long_transaction_elsewhere_stalls_nothing(rig: Rig) -> None:
    """Seen to fail (nothing published) with `AND xmin::text::bigint < txid_snapshot_xmin(...)` in the select."""
    with rig.database.engine.connect() as elsewhere:
        elsewhere.execute(text("SELECT pg_current_xact_id()"))
        messages = rig.publish(50)
        with rig.run_here(once=True) as relay:
            assert relay.ended() == 0
        rig.assert_published(messages)


def test_two_writers_of_one_key_keep_the_order_of_their_commits(rig: Rig) -> None:
    """Seen to fail (published in the order of the numbers, not of the commits) without the advisory locks in

    db/outbox.py `_keep_order`.
    """
    commits: list[OutboxMessage] = []
    first, second = rig.message(key="k"), rig.message(key="k")

    def write_second() -> None:
        with rig.database.begin("test") as connection:
            rig.insert(connection, [second])
        commits.append(second)

    with rig.database.engine.connect() as connection:
        rig.insert(connection, [first])
        other = threading.Thread(target=write_second)
        other.start()
        rig.wait_for(lambda: _waits_for_a_lock(rig) or not other.is_alive(), what="the second writer")
        connection.commit()
        commits.append(first)
    other.join()
    with rig.run_here(once=True) as relay:
        assert relay.ended() == 0
    assert by_key(rig.read())["k"] == [str(message.id) for message in commits]
    assert commits == [first, second]


def _waits_for_a_lock(rig: Rig) -> bool:
    return bool(rig.sql("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))


def test_delayed_message_comes_when_due_and_not_before(rig: Rig) -> None:
    soon = clock.now() + timedelta(seconds=1)
    due, not_due = rig.message(key="k0", deliver_at=soon), rig.message(key="k0", deliver_at=soon + timedelta(hours=1))
    with rig.database.begin("test") as connection:
        rig.insert(connection, [due, not_due])
    prompt = rig.publish(10, keys=1)
    with rig.run_here():
        rig.wait_for(lambda: rig.sql("SELECT count(*) FROM eo.delayed_message") == [(1,)], what="one to be due")
        rig.wait_empty()
    rig.assert_published([*prompt, due])
    *_, last = raw_records(rig.settings, rig.topic)
    assert last.timestamp()[1] >= int(soon.timestamp() * 1000)
    assert rig.sql("SELECT id FROM eo.delayed_message") == [(not_due.id,)]


def test_delayed_messages_come_in_the_order_of_their_times(rig: Rig) -> None:
    """Whenever they were published, and also if the relay was away when each of them became due.

    Seen to fail with `deliver_at` taken out of the last ORDER BY of `_MOVE_DUE` (db/pending.py).
    """
    now = clock.now()
    minutes = [rig.message(key="k0", deliver_at=now - timedelta(minutes=ago)) for ago in (1, 3, 2)]
    with rig.database.begin("test") as connection:
        rig.insert(connection, minutes)
    with rig.run_here(once=True) as relay:
        assert relay.ended() == 0
    rig.assert_published([minutes[1], minutes[2], minutes[0]])


def test_idempotent_mode_publishes_everything_at_least_once(rig: Rig) -> None:
    messages = rig.publish(200)
    with rig.run_here(once=True, relay_mode="idempotent") as relay:
        assert relay.ended() == 0
    rig.assert_published(messages)
    assert list(raw_records(rig.settings, rig.checkpoint_topic)) == []


def test_idempotent_mode_first_settles_what_transactions_left(rig: Rig) -> None:
    """Seen to fail (doubled) without `_settle_earlier_transactions` in relay/relay.py."""
    messages = rig.publish(40, keys=1)
    victim = rig.start(die_at="kafka.transaction.committed")
    assert victim.wait() < 0
    with rig.run_here(once=True, relay_mode="idempotent") as relay:
        assert relay.ended() == 0
    rig.assert_published(messages)


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_the_users_isolation_level_does_not_matter(rig: Rig, isolation: str) -> None:
    messages = rig.publish(100)
    engine = rig.database.engine.execution_options(isolation_level=isolation)
    with rig.on(engine).run_here(once=True) as relay:
        assert relay.ended() == 0
    rig.assert_published(messages)
