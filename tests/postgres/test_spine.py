"""A message's whole way, through PgBouncer and on the oldest PostgreSQL: crashes, a zombie, failures, operators.

What is promised does not depend on what stands between, nor on what is new in PostgreSQL.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.cli.conftest import Shell
from tests.conftest import Addresses
from tests.consume.harness import scalar
from tests.consume.nursery import Nursery
from tests.outages.conftest import Scene
from tests.outages.test_kafka import drained
from tests.postgres.bouncer import bouncer_before
from tests.postgres.conftest import SHORT, empty_shell, fresh_scene
from tests.postgres.servers import OLDEST, server_of
from tests.processes import eventually, read_topic

SHOP = "tests.roles.shop:app"
WAYS = ("through PgBouncer", f"on PostgreSQL {OLDEST}")


@pytest.fixture(scope="module", params=WAYS)
def url(request: pytest.FixtureRequest, services: Addresses) -> Iterator[str]:
    """A server, reached in this way."""
    if request.param == WAYS[0]:
        with bouncer_before(services.database_url) as bouncer:
            yield bouncer.url
    else:
        with server_of(OLDEST) as server:
            yield server.database_url


@pytest.fixture
def scene(url: str, services: Addresses, nursery: Nursery, tmp_path: Path) -> Iterator[Scene]:
    with fresh_scene(url, services, nursery, tmp_path) as made:
        yield made


@pytest.fixture
def shell(url: str, services: Addresses, nursery: Nursery, tmp_path: Path) -> Iterator[Shell]:
    with empty_shell(url, services, nursery, tmp_path) as made:
        yield made


def test_a_killed_worker_a_zombie_and_killed_relays(scene: Scene, tmp_path: Path) -> None:
    """Seen to fail through PgBouncer without `prepare_threshold = None` in db/links.py: no process got past its start,
    `prepared statement "_pg3_0" already exists`.
    """
    mark = tmp_path / "frozen"
    scene.send(400).join()
    victim = scene.spawn(CRASH_AT="db.committing+:3", **SHORT)
    assert victim.wait() == -signal.SIGKILL
    zombie = scene.spawn(FREEZE_AT="consume.handled:2", FREEZE_MARK=str(mark), **SHORT)
    eventually(mark.exists, "the zombie is frozen inside its transaction", log=zombie.log)
    worker = scene.spawn(**SHORT)
    for point in ("relay.committed:1", "relay.produced:2"):
        dying = scene.spawn("relay", CRASH_AT=point, EO_RELAY_BATCH="50")
        assert dying.wait() == -signal.SIGKILL
    relay = scene.spawn("relay")
    scene.send(200).join()
    scene.reach(600, worker)
    zombie.signal(signal.SIGCONT)
    eventually(lambda: "read from the position rows" in zombie.output(), "the zombie is told", log=zombie.log)
    scene.send(100).join()
    scene.reach(700, worker)
    scene.check_ledger()
    scene.check_published()
    drained(worker, zombie, relay)


def test_failures_operators_and_the_way_of_a_message(shell: Shell) -> None:
    """From an empty database: migrations go the same way as everything else."""
    suffix, group = shell.suffix, f"roles-{shell.suffix}.book"
    shell.run("db", "upgrade")
    with shell.database.begin("test") as connection:
        connection.execute(text("CREATE TABLE booking (id int, pid int)"))
    shell.run("topics", "apply", SHOP)
    shell.run("publish", SHOP, f"roles.orders.{suffix}", stdin="".join(f'{{"order_id": {n}}}\n' for n in (1, 2, -3, 4)))
    shell.run("relay", SHOP, "--once")
    shell.run("run", SHOP, "--once")
    assert shell.scalar("SELECT count(*) FROM booking") == 3
    letter = str(shell.scalar("SELECT id FROM eo.dead_letter"))
    assert "below zero" in shell.run("dead", "try", SHOP, letter, code=4).stdout
    shell.run("dead", "replay", SHOP, letter)
    shell.run("run", SHOP, "--once", "--handler", "book")
    shell.run("dead", "discard", str(shell.scalar("SELECT max(id) FROM eo.dead_letter")), "--yes")
    shell.run("reprocess", SHOP, "book", "--from", "earliest")
    shell.run("position", "set", group, "0", "earliest")
    shell.run("run", SHOP, "--once", "--handler", "book")
    shell.run("relay", SHOP, "--once")
    assert shell.scalar("SELECT count(*) FROM booking") == 3, "what was processed is known, whoever asks again"
    servers = shell.settings.require_bootstrap_servers()
    assert [len(read_topic(servers, f"roles.{name}.{suffix}")) for name in ("booked", "copies")] == [3, 3]
    assert shell.scalar("SELECT count(*) FROM eo.outbox_message") == 0
    for command in (("dead", "ls"), ("outbox", "ls"), ("outbox", "stats"), ("external", "ls"), ("position", "show")):
        shell.run(*command)
    shell.run("db", "check")


def test_pruning(scene: Scene) -> None:
    worker = scene.spawn(EO_PROCESSED_RETENTION="1", EO_PRUNE_INTERVAL="0.2")
    scene.send(200).join()
    scene.reach(200, worker)
    ids = "SELECT count(*) FROM eo.processed_message"
    eventually(lambda: scalar(scene.engine, ids) == 0, "old ids are gone", log=worker.log)
    drained(worker)
