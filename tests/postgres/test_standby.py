"""The primary dies under load and a standby is promoted; nobody does anything besides, as the URL names all servers.

With a synchronous standby nothing is lost. Without one the tail that is lost is noticed, told exactly, and resolved by
the commands that are told.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from eoframework import App, Topic
from eoframework.db import readiness
from eoframework.db.readiness import where
from eoframework.db.session import open_database
from eoframework.errors import LostConnection, Unreachable
from eoframework.kafka.admin import Admin
from eoframework.schema import Schema
from tests.apps.ledger import Entry
from tests.conftest import Addresses, make_settings
from tests.consume.harness import column, scalar
from tests.consume.nursery import Nursery
from tests.outages.conftest import PARTITIONS, Scene
from tests.outages.test_kafka import drained
from tests.postgres.conftest import scene_at
from tests.postgres.servers import NEWEST, programs_of
from tests.postgres.standby import Replicas, replicas
from tests.processes import eventually, read_topic

IN_DOUBT = "its COMMIT did not wait for the synchronous standby"
WAITING = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND query ~* '^commit'"


@pytest.fixture
def synchronous() -> Iterator[Replicas]:
    with replicas(programs_of(NEWEST), synchronous=True, count=3) as running:
        yield running


@pytest.fixture
def asynchronous() -> Iterator[Replicas]:
    with replicas(programs_of(NEWEST), synchronous=False, count=2) as running:
        yield running


OpenScene = Callable[[Replicas], Scene]


@pytest.fixture
def scene_on(services: Addresses, nursery: Nursery, tmp_path: Path) -> Iterator[OpenScene]:
    opened = []

    def on(servers: Replicas) -> Scene:
        opened.append(scene_at(servers.url, services, nursery, tmp_path))
        return opened[-1].__enter__()

    yield on
    for scene in opened:
        scene.__exit__(None, None, None)


class Writer:
    """A web app beside the handlers: each of its transactions writes a row and publishes one message about it."""

    def __init__(self, scene: Scene) -> None:
        self.confirmed: list[int] = []
        self._topic = Topic(f"{scene.booked}.web", Entry, key="key")
        self._app = App("web", settings=scene.settings)
        self._engine = create_engine(scene.settings.require_database_url(), pool_pre_ping=True)
        self._stop = threading.Event()
        self._scene = scene
        Admin(scene.settings).create(self._topic.name, partitions=1, replicas=1, config={})
        with scene.engine.begin() as connection:
            connection.execute(text("CREATE TABLE visit (n int)"))
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        number = 0
        while not self._stop.wait(0.01):
            number += 1
            try:
                with Session(self._engine) as session, session.begin():
                    session.execute(text("INSERT INTO visit VALUES (:n)"), {"n": number})
                    self._app.publish(session, self._topic, Entry(key="web", n=number))
            except DBAPIError:
                continue  # in doubt: a web app would tell its user to look
            self.confirmed.append(number)

    def end(self) -> None:
        self._stop.set()
        self._thread.join()
        self._engine.dispose()

    def check(self) -> None:
        """What was confirmed is there, each row has its message once, and no message is without a row."""
        rows = column(self._scene.engine, "SELECT n FROM visit ORDER BY n")
        assert set(self.confirmed) <= set(rows)
        found = read_topic(self._scene.own.bootstrap_servers, self._topic.name)
        assert sorted(json.loads(message.value() or b"")["n"] for message in found) == rows


@pytest.mark.parametrize("form", ["a host for each", "lists"])
def test_a_url_that_names_all_servers(asynchronous: Replicas, services: Addresses, form: str) -> None:
    """Whichever takes writes is found, and the error of a URL that leads nowhere names all, without the password."""
    url = asynchronous.url
    ports = [server.port for server in asynchronous.servers.values()]
    if form == "lists":
        head, _, rest = url.partition("?")
        hosts = ",".join(["127.0.0.1"] * len(ports))
        url = f"{head}?host={hosts}&port={','.join(map(str, ports))}&{rest.rpartition('&')[2]}"
    settings = make_settings(url.replace("+psycopg", ""), services.bootstrap_servers)
    database = open_database(settings.require_database_url(), Schema())
    for _ in range(2):
        assert scalar(database.engine, "SELECT pg_is_in_recovery()") is False
        assert scalar(database.engine, "SHOW port") == str(asynchronous.servers[asynchronous.primary].port)
        if asynchronous.primary == "a":
            asynchronous.kill_primary()
            asynchronous.promote()
            database.engine.dispose()
    asynchronous.kill_primary()
    database.engine.dispose()
    with pytest.raises(Unreachable) as refused:
        readiness.wait_until_reachable(database, wait=False)
    assert where(database).startswith("127.0.0.1")
    assert str(refused.value).count("127.0.0.1") >= len(ports)
    assert all(secret not in str(refused.value) for secret in settings.secrets())
    assert settings.secrets()


def test_two_promotions_under_load_lose_and_double_nothing(synchronous: Replicas, scene_on: OpenScene) -> None:
    """Workers, relay and a web app go on by themselves.

    Seen to fail with the standbys asynchronous and deaf for 1.5 s before the kill: the workers stopped (exit code 70),
    "was processed up to 281, but the database's position is 250".
    """
    scene = scene_on(synchronous)
    workers, relay, web = [scene.spawn(), scene.spawn()], scene.spawn("relay"), Writer(scene)
    sending = scene.send(1500, over=6)
    for mark in (200, 700):
        scene.reach(mark, workers[0])
        synchronous.kill_primary()
        synchronous.promote()
    sending.join()
    scene.reach(1500, workers[0])
    web.end()
    scene.check_ledger()
    scene.check_published()
    web.check()
    drained(*workers, relay)


def test_a_commit_whose_wait_for_the_standby_was_cancelled_is_in_doubt(
    synchronous: Replicas, scene_on: OpenScene
) -> None:
    """PostgreSQL calls it a success. The standby never gets it, and is promoted: the batch runs again.

    Seen to fail without `check_confirmed` in WorkerConnection._commit: its offset was committed to the group.
    """
    scene = scene_on(synchronous)
    worker = scene.spawn()
    scene.send(100).join()
    scene.reach(100, worker)
    eventually(lambda: group_reached(scene) == 100 and synchronous.caught_up(), "all is quiet")
    with synchronous.deaf("b"), synchronous.deaf("c"):
        scene.send(40).join()
        told = lambda: IN_DOUBT in worker.output() or group_reached(scene) > 100  # noqa: E731
        eventually(lambda: cancel_waiting(synchronous) and told(), "what it makes of that", log=worker.log)
        assert group_reached(scene) == 100, "nobody was told that the batch is done"
        eventually(lambda: synchronous.ask("a", WAITING), "its claim waits too", log=worker.log)
        synchronous.kill_primary()
    synchronous.promote()
    scene.reach(140, worker)
    scene.check_ledger()
    drained(worker)


def test_the_relay_sends_nothing_that_the_standby_may_not_have(synchronous: Replicas, scene_on: OpenScene) -> None:
    """A web app's COMMIT was cancelled, so its row is visible; the relay's own COMMIT is cancelled as well.

    Seen to fail without `check_confirmed` in Shards._connection: the message was sent, and the promotion took back the
    row that it was about.
    """
    scene = scene_on(synchronous)
    relay = scene.spawn("relay")
    app, topic = App("web", settings=scene.settings), Topic(scene.booked, Entry, key="key")
    eventually(lambda: scalar(scene.engine, "SELECT count(owner) FROM eo.relay_shard") == 4, "it owns all shards")
    with synchronous.deaf("b"), synchronous.deaf("c"):
        writing = threading.Thread(target=publish_one, args=(scene, app, topic))
        writing.start()
        # Whatever waits, again and again: an operator's loop, or a pooler's query_timeout.
        eventually(lambda: cancel_waiting(synchronous) and not writing.is_alive(), "the web app's row is visible")
        writing.join()
        before = relay.output().count(IN_DOUBT)
        doubts = lambda: relay.output().count(IN_DOUBT) - before  # noqa: E731
        decided = lambda: cancel_waiting(synchronous) and (doubts() >= 2 or sent(scene))  # noqa: E731
        eventually(decided, "what the relay makes of it", log=relay.log)
        assert not sent(scene)
        synchronous.kill_primary()
    synchronous.promote()
    with Session(scene.engine) as session, session.begin():
        app.publish(session, topic, Entry(key="k", n=2))
    eventually(lambda: not scalar(scene.engine, "SELECT count(*) FROM eo.outbox_message"), "sent", log=relay.log)
    found = read_topic(scene.own.bootstrap_servers, scene.booked)
    assert [json.loads(message.value() or b"")["n"] for message in found] == [2]
    drained(relay)


def publish_one(scene: Scene, app: App, topic: Topic[Entry]) -> None:
    engine = create_engine(scene.settings.require_database_url())
    with Session(engine) as session, session.begin():
        app.publish(session, topic, Entry(key="k", n=1))
    engine.dispose()


def test_a_command_whose_commit_was_cancelled_does_not_say_it_is_done(
    synchronous: Replicas, scene_on: OpenScene
) -> None:
    """Seen to fail without `check_confirmed` in Database.brief."""
    scene = scene_on(synchronous)
    database = open_database(synchronous.url, Schema())
    outcome: list[object] = []

    def change() -> None:
        try:
            with database.brief("changing something") as connection:
                connection.execute(text("CREATE TABLE changed (n int)"))
            outcome.append("done")
        except LostConnection as error:
            outcome.append(error)

    with synchronous.deaf("b"), synchronous.deaf("c"):
        changing = threading.Thread(target=change)
        changing.start()
        eventually(lambda: cancel_waiting(synchronous), "its COMMIT waits")
        changing.join()
    assert isinstance(outcome[0], LostConnection)
    assert scalar(scene.engine, "SELECT count(*) FROM changed") == 0
    database.engine.dispose()


def test_what_an_asynchronous_standby_lacked_is_told_and_resolved(
    asynchronous: Replicas, scene_on: OpenScene, nursery: Nursery, tmp_path: Path
) -> None:
    """Handler and relay stop with exit code 70, naming the offsets and the commands; these are followed to the letter.

    Seen to fail with `set_back` taken out of Ownership._renew and `refuse_moved_offset` out of _take: the lost batches
    are done again without a word.
    """
    scene = scene_on(asynchronous)
    worker, relay = scene.spawn(), scene.spawn("relay")
    scene.send(160).join()
    scene.reach(160, worker)
    scene.check_published()
    eventually(asynchronous.caught_up, "the standby has everything")
    kept = positions(scene)
    asynchronous.cut()
    scene.send(80).join()
    scene.reach(240, worker)
    scene.check_published()
    eventually(lambda: group_reached(scene) == 240, "the group's offsets are committed", log=worker.log)
    reached = positions(scene)
    asynchronous.kill_primary()
    asynchronous.promote()
    assert worker.wait() == 70, worker.output()
    assert relay.wait() == 70, relay.output()
    assert positions(scene) == kept, "what was lost is not made up for by guessing"
    said = refused(scene, "run")
    for partition, offset in reached.items():
        told = (
            f"{scene.topic}[{partition}] was processed up to {offset}, but the database's position is {kept[partition]}"
        )
        assert told in said
    follow(said, "To redo them: ", nursery, scene, tmp_path)
    worker = scene.spawn()
    scene.reach(240, worker)
    scene.check_ledger()
    drained(worker)
    # What the handlers published now bears the ids of the first time, so it is found in its topic.
    follow(refused(scene, "relay"), "nobody uses any more: ", nursery, scene, tmp_path)
    relay = scene.spawn("relay")
    scene.check_published()
    drained(relay)
    audited = "SELECT action FROM eo.audit ORDER BY id"
    assert column(scene.engine, audited) == ["position.set"] * PARTITIONS + ["outbox.adopt"]


def refused(scene: Scene, *command: str) -> str:
    """What a worker or relay says that must not go on."""
    process = scene.spawn(*command)
    assert process.wait() == 70, process.output()
    return process.log.read_text()


def follow(said: str, choice: str, nursery: Nursery, scene: Scene, tmp_path: Path) -> None:
    """Run the commands that stand behind these words, as they are printed."""
    printed = said.partition(choice)[2].partition(". ")[0]
    for command in printed.split(" && "):
        run(nursery, scene, command.removeprefix("eo ").split(), tmp_path)


def run(nursery: Nursery, scene: Scene, arguments: list[str], tmp_path: Path) -> str:
    """An `eo` command that needs no app."""
    log = tmp_path / f"eo-{len(list(tmp_path.iterdir()))}.log"
    url, servers = scene.settings.require_database_url(), scene.settings.require_bootstrap_servers()
    environment = {"EO_DATABASE_URL": url, "EO_KAFKA_BOOTSTRAP_SERVERS": servers, "COLUMNS": "200"}
    process = nursery.spawn(*arguments, environment=environment, log=log)
    assert process.wait() == 0, process.output()
    return process.output()


def cancel_waiting(servers: Replicas) -> bool:
    """Cancel every COMMIT that waits for its standby, as an operator may who sees them hang."""
    waiting = [row[0] for row in servers.ask(servers.primary, WAITING)]
    for pid in waiting:
        servers.ask(servers.primary, f"SELECT pg_cancel_backend({pid})")
    return bool(waiting)


def positions(scene: Scene) -> dict[int, int]:
    with scene.engine.connect() as connection:
        rows = connection.execute(text("SELECT partition, next_offset FROM eo.position"))
        return {row[0]: row[1] for row in rows}


def sent(scene: Scene) -> int:
    """How many records there are in the topic of what was booked."""
    return sum(Admin(scene.settings).watermarks(scene.booked, partition)[1] for partition in range(PARTITIONS))


def group_reached(scene: Scene) -> int:
    """The sum of the group's offsets in Kafka."""
    offsets = Admin(scene.settings).group_offsets(f"ledger-{scene.topic}.book", scene.topic)
    return sum(offset for offset, _ in offsets.values())
