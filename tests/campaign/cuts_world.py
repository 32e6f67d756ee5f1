"""One round: a small application whose workers are in this process, and whose every connection may be cut.

    web application > outbox > relay > visits > handler > outbox > relay > bookings > transform > slips
    another producer ------------------^

The other producer's messages have no ids, so nothing but the position tells whether the handler has had them.
"""

from __future__ import annotations

import logging
import random
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, TopicPartition
from pydantic import BaseModel
from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from eoframework import App, Message, Topic, Tx, clock, lifecycle
from eoframework.checkpoint import checkpoint_topic
from eoframework.consume.worker import ConsumeWorker
from eoframework.db.session import open_database
from eoframework.kafka import transaction
from eoframework.kafka.admin import Admin
from eoframework.relay import RelayWorker
from eoframework.schema import Schema
from eoframework.settings import Settings
from eoframework.transform.worker import TransformWorker
from tests.campaign.cuts_fates import Call, Fates, Moment, Tally
from tests.campaign.cuts_kafka import CuttingProxy
from tests.campaign.cuts_postgres import PUBLISH, PostgresProxy
from tests.campaign.cuts_without import without
from tests.conftest import Addresses, database_named, make_settings, mint_outbox
from tests.processes import produce
from tests.transform.scene import admin_client, create_topics

KEYS, PARTITIONS, SLIPS, SHARDS = 4, 2, 2, 4
STRANGERS = 1_000_000
"""From this number on messages are the other producer's."""
TABLES = """
CREATE TABLE visit (n int PRIMARY KEY, key text NOT NULL);
CREATE TABLE entry (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, key text NOT NULL, n int NOT NULL);
CREATE TABLE account (key text PRIMARY KEY, entries int NOT NULL, total bigint NOT NULL);
"""
_VISIT = text("INSERT INTO visit (n, key) VALUES (:n, :key)")
_ENTRY = text("INSERT INTO entry (key, n) VALUES (:key, :n)")
_ACCOUNT = text("""
INSERT INTO account AS old VALUES (:key, 1, :n)
ON CONFLICT (key) DO UPDATE SET entries = old.entries + 1, total = old.total + excluded.total
""")
# Small batches for many commits; short waits, since after every cut somebody waits.
_QUICK: dict[str, Any] = {
    **{"max_batch": 2, "max_wait": 0.05, "relay_batch": 2, "relay_poll_max": 0.02},
    **{"transform_batch": 3, "transform_interval": 0.01, "transform_message_timeout": 3},
    "kafka": {"reconnect.backoff.max.ms": "200", "fetch.wait.max.ms": "50"},
}
_CALL_TIMEOUT = 1.0
"""Seconds after which a producer that hears nothing gives up its commit; elsewhere 15."""


class Visit(BaseModel):
    key: str
    n: int


class Booking(BaseModel):
    key: str
    n: int


class Slip(BaseModel):
    n: int
    part: int


@dataclass(frozen=True)
class Plan:
    """What one round does; from its seed alone."""

    seed: str
    messages: int = 60
    longest: float = 90.0
    """Seconds until whatever is not through by then counts as lost."""
    without: str = ""
    shares: dict[Call, float] | None = None
    """How many of the calls are cut; by default drawn."""

    def drawn(self) -> dict[Call, float]:
        if self.shares is not None:
            return self.shares
        commits, ends = random.Random(f"{self.seed} shares").choice([(0.7, 0.7), (0.8, 0.3), (0.4, 0.8), (0.6, 0.6)])
        return {"COMMIT": commits, "EndTxn": ends}


@dataclass
class Result:
    """What one round came to."""

    seed: str
    tally: Tally
    violations: list[str]
    seconds: float
    log: str = ""


@dataclass
class World:
    """Where it happens; `engine` and `servers` lead past the proxies, for who judges."""

    engine: Engine
    servers: str
    app: App
    visits: Topic[Visit]
    bookings: Topic[Booking]
    slips: Topic[Slip]
    told: dict[int, Moment | None] = field(default_factory=dict)
    """What became of the COMMIT of each visit that the web application published; None: it was confirmed."""
    problems: list[str] = field(default_factory=list)

    @property
    def topics(self) -> tuple[str, str, str]:
        return self.visits.name, self.bookings.name, self.slips.name

    def number(self, statement: str) -> int:
        with self.engine.connect() as connection:
            return int(connection.scalar(text(statement)) or 0)


class Round:
    """Makes a world, cuts, waits until all is through, and tells what is left of it."""

    def __init__(self, addresses: Addresses, template: str, plan: Plan, directory: Path) -> None:
        self._addresses, self._template, self._plan = addresses, template, plan
        self._log = directory / f"{plan.seed.replace(':', '.')}.log"
        self._fates = Fates(plan.seed, shares=plan.drawn())

    @contextmanager
    def lived(self) -> Iterator[World]:
        """The world after its end: nobody is at work in it any more."""
        with ExitStack() as stack:
            stack.enter_context(_logged(self._log))
            stack.enter_context(without(self._plan.without))
            stack.enter_context(_impatient())
            name = f"eo_cuts_{uuid.uuid4().hex[:12]}"
            url = stack.enter_context(database_named(self._addresses, name, source=self._template))
            mint_outbox(url)
            postgres, kafka = self._proxies(stack, url)
            world = self._world(stack, url, postgres, kafka)
            postgres.fates = kafka.fates = self._fates
            self._live(world, self._settings(url, postgres, kafka))
            postgres.fates = kafka.fates = None
            for whose, times in kafka.went_on.items():
                # Harmless here, where nothing comes late; elsewhere the second copy ends what is open when it comes.
                world.problems.append(
                    f"{whose} went on with a producer whose EndTxn may be sent twice ({times} requests)"
                )
            yield world

    def result(self, violations: list[str], seconds: float) -> Result:
        """The log is kept if there is something to find in it."""
        if not violations:
            self._log.unlink(missing_ok=True)
        return Result(self._plan.seed, self._fates.tally, violations, seconds, str(self._log) if violations else "")

    # --- the stage ---

    def _proxies(self, stack: ExitStack, url: str) -> tuple[PostgresProxy, CuttingProxy]:
        server = make_url(url)
        host, _, port = self._addresses.bootstrap_servers.rpartition(":")
        postgres, kafka = (
            PostgresProxy((server.host or "127.0.0.1", server.port or 5432)),
            CuttingProxy((host, int(port))),
        )
        stack.callback(kafka.close)
        stack.callback(postgres.close)
        return postgres, kafka

    def _settings(self, url: str, postgres: PostgresProxy, kafka: CuttingProxy) -> Settings:
        through = make_url(url).set(host="127.0.0.1", port=postgres.port).render_as_string(hide_password=False)
        return make_settings(through, kafka.address, **_QUICK)

    def _world(self, stack: ExitStack, url: str, postgres: PostgresProxy, kafka: CuttingProxy) -> World:
        settings = self._settings(url, postgres, kafka)
        engine = create_engine(url)
        stack.callback(engine.dispose)
        with engine.begin() as connection:
            connection.execute(text(TABLES))
        database = open_database(settings.require_database_url(), Schema())
        stack.callback(database.engine.dispose)
        mark = uuid.uuid4().hex[:8]
        app = App(f"cuts{mark}", engine=database.engine, settings=settings)
        world = World(
            engine,
            self._addresses.bootstrap_servers,
            app,
            Topic(f"visits.{mark}", Visit, key="key"),
            Topic(f"bookings.{mark}", Booking, key="key"),
            Topic(f"slips.{mark}", Slip),
        )
        _declare(world)
        self._make_topics(stack, world, settings)
        self._strangers(world)
        return world

    def _make_topics(self, stack: ExitStack, world: World, settings: Settings) -> None:
        checkpoints = checkpoint_topic(_outbox_id(world.engine))
        letters = f"{world.app.name}.show.dlt"
        create_topics(world.servers, dict.fromkeys(world.topics, PARTITIONS) | {letters: 1})
        Admin(settings).create(checkpoints, partitions=SHARDS, replicas=1, config={"cleanup.policy": "compact"})
        stack.callback(admin_client(world.servers).delete_topics, [*world.topics, letters, checkpoints])

    def _strangers(self, world: World) -> None:
        made = [Visit(key=f"stranger{n % KEYS}", n=STRANGERS + n) for n in range(self._plan.messages // 2)]
        sent = [(visit.key.encode(), visit.model_dump_json().encode()) for visit in made]
        produce(world.servers, world.visits.name, sent)

    # --- what happens in it ---

    def _live(self, world: World, settings: Settings) -> None:
        stop, codes = threading.Event(), list[int]()
        workers = threading.Thread(
            target=lambda: codes.append(lifecycle.run(_workers(world, settings, stop), stop=stop))
        )
        web = threading.Thread(target=self._publish, args=(world,))
        workers.start()
        web.start()
        web.join()
        if not self._wait(world, workers) and not self._plan.without:
            world.problems.append(f"not through after {self._plan.longest:g} s")
        stop.set()
        workers.join(60)
        if codes != [0]:
            world.problems.append(f"the workers ended with {codes[0]}" if codes else "the workers did not end")

    def _publish(self, world: World) -> None:
        """Rows and their messages, one COMMIT each; after a broken one the web application just goes on."""
        for n in range(self._plan.messages // 2):
            visit = Visit(key=f"web{n % KEYS}", n=n)
            try:
                with Session(world.app.database.engine) as session, session.begin():
                    session.execute(_VISIT, {"n": n, "key": visit.key})
                    world.app.publish(session, world.visits, visit)
            except DBAPIError as error:
                world.told[n] = self._fates.last(PUBLISH)
                if world.told[n] is None:
                    world.problems.append(f"publishing {n} failed, and no COMMIT was cut: {error!r}")
            except Exception as error:  # noqa: BLE001 - whatever it is: no caller of publish expects it
                world.told[n] = self._fates.last(PUBLISH)
                world.problems.append(f"publishing {n} raised {error!r}")
            else:
                world.told[n] = None

    def _wait(self, world: World, workers: threading.Thread) -> bool:
        expected = world.number("SELECT count(*) FROM visit") + self._plan.messages // 2
        deadline = clock.monotonic() + self._plan.longest
        slips = 0
        with reader(world.servers, [world.slips.name]) as consumer:
            while clock.monotonic() < deadline and workers.is_alive():
                slips += sum(message.error() is None for message in consumer.consume(500, 0.05))
                booked = world.number("SELECT count(*) FROM entry") >= expected
                if booked and slips >= expected * SLIPS and not world.number("SELECT count(*) FROM eo.outbox_message"):
                    return True
        return False


def _declare(world: World) -> None:
    @world.app.handler(world.visits, name="book")
    def book(message: Message[Visit], tx: Tx) -> None:
        visit = message.payload
        values = {"key": visit.key, "n": visit.n}
        tx.session.execute(_ENTRY, values)
        tx.session.execute(_ACCOUNT, values)
        tx.publish(world.bookings, Booking(key=visit.key, n=visit.n))

    @world.app.transform(world.bookings, to=world.slips, name="show")
    def show(message: Message[Booking]) -> list[Slip]:
        return [Slip(n=message.payload.n, part=part) for part in range(SLIPS)]


def _workers(world: World, settings: Settings, stop: threading.Event) -> list[lifecycle.Worker]:
    app, admin = world.app, Admin(settings)
    return [
        ConsumeWorker(app.handlers[0], app=app, settings=settings, admin=admin, stop=stop),
        TransformWorker(app.transforms[0], app=app, settings=settings, admin=admin, stop=stop),
        RelayWorker(app.database, settings, admin=admin),
    ]


def _outbox_id(engine: Engine) -> uuid.UUID:
    with engine.connect() as connection:
        found: uuid.UUID = connection.execute(text("SELECT id FROM eo.outbox")).scalar_one()
        return found


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What the workers say in this round, in a file of its own."""
    logger = logging.getLogger()
    handler, level = logging.FileHandler(path), logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(threadName)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


@contextmanager
def _impatient() -> Iterator[None]:
    """Producers that give up soon: no setting says how long they wait for the answer to a commit."""
    before, transaction._CALL_TIMEOUT = transaction._CALL_TIMEOUT, _CALL_TIMEOUT
    try:
        yield
    finally:
        transaction._CALL_TIMEOUT = before


@contextmanager
def reader(servers: str, topics: Iterable[str]) -> Iterator[Consumer]:
    """A read_committed client at the beginning of these topics that shares no code with the product."""
    consumer = Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": f"reader-{uuid.uuid4()}",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "fetch.wait.max.ms": 20,
        }
    )
    try:
        consumer.assign([TopicPartition(topic, partition, 0) for topic in topics for partition in range(PARTITIONS)])
        yield consumer
    finally:
        consumer.close()
