"""Another server, another cluster: what is moved or mirrored, and a copy of a whole server."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient
from sqlalchemy import make_url

from eoframework import dev
from eoframework.dev import postgres_programs
from eoframework.dev.open_home import PROGRAMS
from eoframework.dev.postgres import PostgresServer
from tests.consume.nursery import Nursery
from tests.processes import eventually, produce
from tests.restored.rig import APP, Shop, mirror


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dev.Services]:
    """A second broker and a second server."""
    fast = dev.PostgresOptions(settings={"fsync": "off", "full_page_writes": "off"})
    with dev.start(tmp_path_factory.mktemp("second") / ".eo", postgres=fast) as started:
        yield started


@pytest.fixture
def moved(shop: Shop, second: dev.Services) -> Iterator[Shop]:
    """The shop's database with the second cluster, on which the topics are, with other offsets than on the first."""
    shop.publish(0, 6)
    shop.work()
    shop.publish(6, 4)
    there = shop.elsewhere(servers=second.bootstrap_servers)
    admin = there.shell.admin
    admin.create(there.orders, partitions=2, replicas=1, config={})
    produce(second.bootstrap_servers, there.orders, [(b"9", b'{"order_id": 99}')], partition=0)
    for name in (there.bills, there.labels):
        admin.create(name, partitions=1, replicas=1, config={})
    admin.create(f"{there.group('label')}.dlt", partitions=1, replicas=1, config={})
    yield there
    there.end()


def test_the_outbox_on_another_cluster(shop: Shop, moved: Shop) -> None:
    """Seen to fail with the question for the cluster after the one for the topic: it says that the topic is gone."""
    said = moved.refused("relay")
    assert "was relayed to Kafka cluster" in said
    moved.eo("topics", "apply", APP)
    said = moved.refused("relay")
    assert "was relayed to Kafka cluster" in said
    moved.follow(said, "where it is missing:")
    moved.relay()
    assert moved.in_topic(moved.orders) == [6, 7, 8, 9, 99]
    # And the way back is the same.
    moved.publish(10, 2)
    shop.follow(shop.refused("relay"), "where it is missing:")
    shop.relay()
    assert shop.in_topic(shop.orders) == [*range(6), 10, 11]
    assert shop.audited() == ["outbox.adopt"] * 2


def test_a_mirrored_topic_and_its_outbox(shop: Shop, moved: Shop) -> None:
    """What was mirrored was sent, also as the outbox goes on from there. A mirrored checkpoint topic says nothing."""
    mirror(shop, shop.orders, moved)
    shop.relay()  # the last four, after they were mirrored: they are in the first cluster alone
    moved.shell.admin.create(moved.checkpoints, partitions=4, replicas=1, config={"cleanup.policy": "compact"})
    mirror(shop, shop.checkpoints, moved)
    moved.publish(10, 2)
    said = moved.refused("relay")
    assert "was relayed to Kafka cluster" in said
    assert "was copied there" in moved.eo("outbox", "adopt", code=70)
    delete_topic(moved, moved.checkpoints)
    moved.eo("topics", "apply", APP)
    moved.follow(said, "where it is missing:")
    moved.relay()
    assert moved.in_topic(moved.orders) == [*range(6), 10, 11, 99]


def delete_topic(shop: Shop, topic: str) -> None:
    client = AdminClient({"bootstrap.servers": shop.settings.require_bootstrap_servers()})
    client.delete_topics([topic])[topic].result(20)
    eventually(lambda: not shop.shell.admin.existing([topic]), "the topic is gone")


def test_handlers_on_another_cluster(shop: Shop, moved: Shop) -> None:
    """What was processed and mirrored bears its id, and has no second effect."""
    mirror(shop, shop.orders, moved)
    said = moved.refused("run", "book")
    assert "offsets mean nothing across clusters" in said
    moved.follow(said, "If the topic moved here for good:")
    moved.run("book")
    assert moved.booked() == [*range(6), 99]
    assert moved.audited() == ["position.forget"]
    where = moved.one("SELECT detail FROM eo.audit")["next_offsets"]
    assert sum(where.values()) > 0, "where it stood on the first cluster can be read"


def test_transforms_on_another_cluster(shop: Shop, moved: Shop) -> None:
    """Whatever it has made there it makes here: nothing of it is in this cluster yet."""
    mirror(shop, shop.orders, moved)
    said = moved.refused("run", "label")
    assert "offsets mean nothing across clusters" in said
    moved.follow(said, "If the topic moved here for good:")
    moved.run("label")
    assert moved.in_topic(moved.labels) == [*range(6), 99]


def test_a_copy_of_the_whole_server(nursery: Nursery, second: dev.Services, tmp_path: Path) -> None:
    """A base backup of production, started beside it with the same Kafka: nothing in it says that it is a copy. Both
    relay; each message is in its topic once, and the one that comes second stops.
    """
    shop = Shop.made(nursery, second.database_url, second.bootstrap_servers, tmp_path)
    shop.publish(0, 4)
    shop.work()
    shop.publish(4, 8)
    second.postgres.stop()
    server = copied(second.postgres, Path(f"{second.postgres._home}-copy"), tmp_path / "copy.log")
    second.postgres.start()
    server.start()
    try:
        url = make_url(second.database_url).set(port=server.port).render_as_string(hide_password=False)
        snapshot = shop.elsewhere(database_url=url)
        both = [shop.start("relay", APP), snapshot.start("relay", APP)]
        for one in (shop, snapshot):
            eventually(lambda one=one: not one.one("SELECT count(*) FROM eo.outbox_message"), "the rows are gone")
        assert shop.in_topic(shop.orders) == list(range(12)), "what both had was sent once"
        shop.publish(12, 8)
        eventually(lambda: not shop.one("SELECT count(*) FROM eo.outbox_message"), "sent")
        snapshot.publish(100, 8)
        assert eventually(lambda: not both[1].running(), "the copy stops", log=both[1].log)
        assert both[1].wait() == 70, both[1].output()
        assert "eo db adopt copy" in both[1].output()
        shop.publish(20, 4)
        eventually(lambda: not shop.one("SELECT count(*) FROM eo.outbox_message"), "production goes on")
        assert both[0].stop() == 0
        assert snapshot.one("SELECT count(*) FROM eo.outbox_message") > 0
        ours = [order for order in shop.in_topic(shop.orders) if order < 100]
        assert ours == list(range(24))
        snapshot.end()
    finally:
        server.stop(mode="immediate")


def copied(original: PostgresServer, home: Path, log: Path) -> PostgresServer:
    """What a snapshot of the disk is: every file as it was."""
    subprocess.run(["cp", "-a", str(original._home), str(home)], check=True)
    user = postgres_programs.unprivileged_user()
    return PostgresServer(
        home,
        log,
        replace(original._state, process=None, port=None, home=str(home)),
        original._options,
        programs=lambda: postgres_programs.reachable(postgres_programs.find(), user, PROGRAMS),
        user=user,
        changed=lambda: None,
    )
