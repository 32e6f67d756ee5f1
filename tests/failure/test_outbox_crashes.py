"""Killed or doubled anywhere between refusal, retry and discard: each message is sent once, its key in order."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from eoframework import events
from eoframework.db.session import Database
from eoframework.errors import NotFound
from eoframework.kafka.admin import Admin
from eoframework.message import OutboxMessage
from eoframework.outbox_desk import OutboxDesk, PutBack
from eoframework.settings import Settings, environment
from tests.conftest import REPOSITORY, MakeTopic
from tests.processes import eventually, settings_environment
from tests.relay.rig import Rig


@pytest.fixture
def rig(database: Database, settings: Settings, make_topic: MakeTopic, tmp_path: Path) -> Iterator[Rig]:
    """An outbox whose topic takes small messages only."""
    made = Rig(database, settings, make_topic("narrow", config={"max.message.bytes": "4000"}), tmp_path)
    made.mint_identity()
    yield made
    made.end()


def desk(rig: Rig) -> OutboxDesk:
    return OutboxDesk(rig.database, rig.settings, actor="tester")


def publish(rig: Rig) -> tuple[OutboxMessage, OutboxMessage, list[OutboxMessage]]:
    """Of one key: a small one, one that is refused, two that follow."""
    first, large, *later = [rig.message(key="k", size=size) for size in (0, 20_000, 0, 0)]
    with rig.database.begin("test") as connection:
        rig.insert(connection, [first, large, *later])
    return first, large, later


def widen(rig: Rig) -> None:
    admin, limit = Admin(rig.settings), {"max.message.bytes": "1000000"}
    admin.set_config(rig.topic, limit)
    eventually(lambda: admin.describe(rig.topic).config.items() >= limit.items(), "the topic takes large messages")


def drain(rig: Rig) -> None:
    with rig.run_here(once=True, relay_after_dead="hold") as relay:
        assert relay.ended() == 0


def eo(rig: Rig, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.failure.eo_armed", "outbox", *arguments],
        cwd=REPOSITORY,
        env=environment(**settings_environment(rig.settings, **changes)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def places(rig: Rig) -> tuple[int, int, int, int]:
    """How many dead letters, rows of the outbox, held keys and audit rows there are."""
    tables = "eo.dead_letter", "eo.outbox_message", "eo.outbox_held", "eo.audit"
    columns = ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
    return tuple(int(str(count)) for count in rig.sql(f"SELECT {columns}")[0])  # type: ignore[return-value]


@pytest.mark.parametrize("point", ["relay.refused", "relay.dead_lettered"])
def test_relay_killed_around_the_burial(rig: Rig, point: str) -> None:
    """Seen to fail ("relay.dead_lettered": the key is not held) with the hold in a transaction after the event."""
    first, large, later = publish(rig)
    victim = rig.start(die_at=point, relay_after_dead="hold")
    assert victim.wait() == -signal.SIGKILL, victim.log()
    buried = point == "relay.dead_lettered"
    assert places(rig) == ((1, 2, 1, 0) if buried else (0, 3, 0, 0))
    drain(rig)
    assert places(rig) == (1, 2, 1, 0)
    rig.assert_published([first])
    widen(rig)
    desk(rig).retry(large.id)
    drain(rig)
    rig.assert_published([first, large, *later])


@pytest.mark.parametrize(
    "point", ["relay.selected", "relay.produced", "kafka.transaction.committed", "relay.committed", "relay.deleted"]
)
def test_relay_killed_around_a_number_used_again(rig: Rig, point: str) -> None:
    """The row that went back stands in a checkpoint at its old number, and is settled like any other.

    Seen to fail ("kafka.transaction.committed": doubled) with the checkpoint ignored: `settle` in relay/recovery.py
    returning the database's batch number.
    """
    first, large, later = publish(rig)
    drain(rig)
    widen(rig)
    desk(rig).retry(large.id)
    victim = rig.start(die_at=point, relay_after_dead="hold")
    assert victim.wait() == -signal.SIGKILL, victim.log()
    drain(rig)
    rig.assert_published([first, large, *later])
    assert places(rig) == (0, 0, 0, 1)


@pytest.mark.parametrize("verb", ["retry", "discard"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_command_killed_and_said_again(rig: Rig, verb: str, moment: str) -> None:
    """Seen to fail ("before": the letter is gone and its key open already) with `put_back` in autocommit."""
    first, large, later = publish(rig)
    drain(rig)
    widen(rig)
    point = {"retry": ("outbox.retrying", "outbox.retried"), "discard": ("outbox.discarding", "outbox.discarded")}[verb]
    victim = eo(rig, verb, str(large.id), CRASH_AT=f"{point[moment == 'after']}:1")
    assert victim.returncode == -signal.SIGKILL, victim.stderr
    put_back = int(verb == "retry")
    assert places(rig) == ((0, 2 + put_back, 0, 1) if moment == "after" else (1, 2, 1, 0))
    again = eo(rig, verb, str(large.id))
    if moment == "after":
        assert again.returncode == (5 if verb == "discard" else 3), again.stderr
        assert "Nothing was changed" in again.stderr
    else:
        assert again.returncode == 0, again.stderr
    assert places(rig) == (0, 2 + put_back, 0, 1)
    drain(rig)
    rig.assert_published([first, *([large] * put_back), *later])


def test_retry_issued_twice_at_once(rig: Rig) -> None:
    """The second waits for the first's transaction, then finds the letter gone.

    Seen to fail (no clear error) without FOR UPDATE in `_LOCK` of db/outbox_desk.py.
    """
    first, large, later = publish(rig)
    drain(rig)
    widen(rig)
    (letter,) = desk(rig).lines().items
    inside, go_on = threading.Event(), threading.Event()
    outcomes: list[PutBack | NotFound] = []

    def at_the_same_time(name: str, fields: dict[str, object]) -> None:
        if name == "outbox.retrying" and not inside.is_set():
            inside.set()
            assert go_on.wait(30)

    def retry() -> None:
        try:
            outcomes.append(desk(rig).retry(letter.number))
        except NotFound as error:
            outcomes.append(error)

    unsubscribe = events.subscribe(at_the_same_time)
    try:
        threads = [threading.Thread(target=retry) for _ in range(2)]
        threads[0].start()
        assert inside.wait(30)
        threads[1].start()
        rig.wait_for(lambda: waiting_for_locks(rig) == 1, what="the second to wait for the first")
        go_on.set()
        for thread in threads:
            thread.join(30)
    finally:
        unsubscribe()
        go_on.set()
    done, refused = sorted(outcomes, key=lambda outcome: isinstance(outcome, NotFound))
    assert isinstance(done, PutBack)
    assert "is no more: outbox.retry by tester at" in str(refused)
    assert places(rig) == (0, 3, 0, 1)
    drain(rig)
    rig.assert_published([first, large, *later])


def test_a_delayed_message_is_sent_or_discarded_never_both(rig: Rig) -> None:
    """The relay moves it as it becomes due, while it is being discarded: whoever is first has it."""
    message = rig.message(key="k", deliver_at=None)
    with rig.database.begin("test") as connection:
        rig.insert(connection, [message])
    rig.sql(
        "WITH gone AS (DELETE FROM eo.outbox_message RETURNING *) INSERT INTO eo.delayed_message (id, shard, topic,"
        " key, type, source, content_type, payload, created_at, deliver_at) SELECT id, shard, topic, key, type,"
        " source, content_type, payload, created_at, clock_timestamp() FROM gone"
    )
    held: list[int] = []

    def let_the_relay_try(name: str, fields: dict[str, object]) -> None:
        if name == "outbox.discarding":
            drain(rig)
            held.append(len(rig.read()))

    unsubscribe = events.subscribe(let_the_relay_try)
    try:
        desk(rig).discard(message.id)
    finally:
        unsubscribe()
    assert held == [0]
    drain(rig)
    rig.assert_published([])
    assert places(rig) == (0, 0, 0, 1)


def waiting_for_locks(rig: Rig) -> int:
    sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return int(str(rig.sql(sql)[0][0]))
