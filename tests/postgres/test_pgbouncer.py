"""What is special behind PgBouncer in transaction mode: each transaction runs in another of the server's sessions."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from pydantic import BaseModel
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from eoframework import App, Message, Topic, Tx, events
from eoframework.db.position import Positions, Stream, session_name
from eoframework.db.session import Database, open_database
from eoframework.db.unit_of_work import Timeouts, WorkerConnection
from eoframework.errors import LostConnection
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.cli.conftest import Shell
from tests.conftest import REPOSITORY, Addresses, make_settings
from tests.consume.harness import column, make_app, make_ledger, next_offsets, run_once, running
from tests.consume.nursery import Nursery
from tests.postgres.bouncer import Bouncer, bouncer_before
from tests.postgres.conftest import empty_shell
from tests.processes import eventually, produce
from tests.proxy import proxy_to

INSERT = text('INSERT INTO ledger (partition, "offset", note) VALUES (:p, :o, :n)')


class Entry(BaseModel):
    n: int


@pytest.fixture
def pooled(bouncer: Bouncer, database_url: str) -> Iterator[Database]:
    """The test's database, through the bouncer."""
    opened = open_database(bouncer.through(database_url), Schema())
    yield opened
    opened.engine.dispose()


def booking(database: Database, settings: Settings, topic: str, **options: object) -> App:
    """An app that books what it gets into the ledger."""
    url = database.engine.url.render_as_string(hide_password=False)
    app = make_app(make_settings(url, settings.require_bootstrap_servers(), **options), database)

    @app.handler(Topic(topic, Entry), name="book")
    def book(message: Message[Entry], tx: Tx) -> None:
        tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(message.payload.n)})

    return app


# --- nothing is kept in a session ---


def test_a_web_app_publishes_with_engines_of_its_own(pooled: Database, settings: Settings) -> None:
    """Seen to fail without `examine_inside` in db/publishing.py: `prepared statement "_pg3_0" already exists`, in the
    user's own statements as in ours.
    """
    app, topic = App(f"web-{uuid.uuid4().hex[:8]}", settings=settings), Topic("t.web", Entry, key="n")
    engine, asynchronous = create_engine(pooled.engine.url), create_async_engine(pooled.engine.url)

    async def publish_more() -> None:
        for n in range(20, 40):
            async with AsyncSession(asynchronous) as session, session.begin():
                app.publish(session, topic, Entry(n=n))
        await asynchronous.dispose()

    for n in range(20):
        with Session(engine) as session, session.begin():
            app.publish(session, topic, Entry(n=n))
    asyncio.run(publish_more())
    engine.dispose()
    published = column(pooled.engine, "SELECT payload FROM eo.outbox_message ORDER BY seq")
    assert [Entry.model_validate_json(bytes(payload)).n for payload in published] == list(range(40))


def test_what_others_left_in_a_session_is_not_ours(
    services: Addresses, database_url: str, settings: Settings, topic_name: str
) -> None:
    """Another program says SET, not SET LOCAL. Seen to fail without `synchronous_commit` in `_SETTINGS`: effects that a
    crash takes back, after their offset was committed.
    """
    seen: list[tuple[str, ...]] = []
    names = ("synchronous_commit", "statement_timeout", "idle_in_transaction_session_timeout")
    with bouncer_before(services.database_url, default_pool_size="1") as narrow:
        url = narrow.through(database_url)
        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as other:
            other.execute("SET synchronous_commit = off")
            other.execute("SET statement_timeout = 0")
            other.execute("SET idle_in_transaction_session_timeout = 0")
        produce(settings.require_bootstrap_servers(), topic_name, [(None, b'{"n": 1}')])
        database = open_database(url, Schema())
        app = make_app(make_settings(url, settings.require_bootstrap_servers(), statement_timeout=77), database)

        @app.handler(Topic(topic_name, Entry), name="look")
        def look(_: Entry, tx: Tx) -> None:
            seen.append(tuple(str(tx.session.scalar(text(f"SHOW {name}"))) for name in names))

        assert run_once(app) == 0
        database.engine.dispose()
    assert [found[:2] for found in seen] == [("on", "77s")]
    assert seen[0][2] != "0"


def test_no_statement_of_ours_needs_a_session() -> None:
    """Prepared once, LISTENed, locked or SET for a session: a pooler loses it or gives it to somebody else."""
    needs_session = re.compile(
        r"pg_(try_)?advisory_(un)?lock(_shared)?\(|\bLISTEN [a-z{\"]|\bUNLISTEN\b|SET SESSION|WITH HOLD"
        r"|CREATE TEMP(?![^;]*ON COMMIT DROP)"
        r"|set_config\([^()]*, false\)|[\"';] ?SET (?!LOCAL|CONSTRAINTS|TRANSACTION|[a-z_]+ = |[a-z_]+\.)",
    )
    sources = [*(REPOSITORY / "eoframework").rglob("*.py"), *(REPOSITORY / "migrations").rglob("*.py")]
    found = [(source.name, hit[0]) for source in sources if (hit := needs_session.search(source.read_text()))]
    assert found == []
    for wrong in (
        "SELECT pg_advisory_lock(1)",
        "LISTEN eo",
        "SELECT set_config('a', 'b', false)",
        "'SET SESSION a = 1",
    ):
        assert needs_session.search(wrong), wrong


# --- whose transaction holds a row ---


def holding(bouncer: Bouncer, url: str) -> tuple[Stream, WorkerConnection, Database]:
    database = open_database(bouncer.through(url), Schema())
    connection = WorkerConnection(database, Timeouts(10, 5, 60), handler="app.book", session=session_name("host:1:me"))
    positions = Positions(database.schema)
    with connection.begin("claim") as started:
        number = positions.register(started, name="app.book", topic="t")
        stream = Stream(number, "app.book", "t", uuid.UUID(int=7), "cluster")
        positions.start(started, stream, {0: 0})
        positions.claim(started, stream, 0, owner="host:1:me")
    return stream, connection, database


@pytest.mark.parametrize("holder", ["the owner", "somebody else"])
def test_a_successor_ends_the_owners_transaction_and_nobody_elses(
    bouncer: Bouncer, database_url: str, database: Database, holder: str
) -> None:
    """Seen to fail with the recorded session in `_TERMINATE` alone (a.pid = p.backend_pid), as without a pooler: the
    owner's transaction ran in another session, held the row for ever, and was not found.
    """
    stream, owner, through = holding(bouncer, database_url)
    stranger = WorkerConnection(through, Timeouts(10, 5, 60), handler="app.book", session=session_name("host:2:other"))
    positions = Positions(database.schema)
    is_owner = holder == "the owner"
    lost = pytest.raises(LostConnection) if is_owner else contextlib.nullcontext()
    with lost, (owner if is_owner else stranger).begin("hold") as connection:
        connection.execute(text("UPDATE eo.position SET next_offset = next_offset"))
        with database.begin("end the holder") as successor:
            assert positions.terminate_holder(successor, stream, 0) is is_owner
        connection.execute(text("SELECT 1"))
    owner.discard()
    stranger.discard()
    through.engine.dispose()


def test_position_show_says_who_holds_and_not_that_he_is_gone(
    bouncer: Bouncer, services: Addresses, nursery: Nursery, tmp_path: Path
) -> None:
    """No session tells whether an owner lives. Seen to fail with EXISTS alone in position_admin's `_ROWS`."""
    with empty_shell(bouncer.url, services, nursery, tmp_path) as shell:
        shop = _made(shell)
        worker = shell.start("run", shop, "--handler", "book")
        held = "SELECT count(owner) FROM eo.position"
        eventually(lambda: shell.scalar(held), "a worker with a partition", log=worker.log)
        shown = shell.run("position", "show").stdout
        assert f":{worker.pid}:" in shown
        assert "not connected" not in shown
        refused = shell.run("position", "forget", f"roles-{shell.suffix}.book", code=70).stderr
        assert "is running" in refused
        worker.stop()


def _made(shell: Shell) -> str:
    shop = "tests.roles.shop:app"
    shell.run("db", "upgrade")
    with shell.database.begin("test") as connection:
        connection.execute(text("CREATE TABLE booking (id int, pid int)"))
    shell.run("topics", "apply", shop)
    return shop


# --- a COMMIT in doubt ---


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("the server had not seen it", "had not happened"),
        ("the server had answered", "had happened"),
        ("the bouncer was killed", "had"),
    ],
)
def test_effects_once_when_the_way_breaks_at_commit(
    services: Addresses,
    database: Database,
    settings: Settings,
    topic_name: str,
    where: str,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Between bouncer and server, or by the bouncer's death. Seen to fail as tests/consume/test_commit_cut.py says."""
    make_ledger(database.engine)
    produce(settings.require_bootstrap_servers(), topic_name, [(None, b'{"n": %d}' % n) for n in range(30)])
    direct = database.engine.url
    with (
        proxy_to("127.0.0.1", direct.port or 5432) as proxy,
        bouncer_before(services.database_url, upstream=proxy.port) as between,
    ):
        through = open_database(between.through(direct), Schema())
        app = booking(through, settings, topic_name, max_batch=7)

        def breaking() -> None:
            if "killed" in where:
                between.kill()
                between.start()
            else:
                proxy.arm("before" if "not" in where else "after")

        with _at_commit(2, breaking):
            assert run_once(app) == 0
        through.engine.dispose()
    assert f"the last COMMIT {told}" in caplog.text
    assert column(database.engine, 'SELECT "offset" FROM ledger ORDER BY id') == list(range(30))
    assert next_offsets(database) == [(0, 30)]


class _at_commit:  # noqa: N801 - used as a context manager, reads as a function
    """Calls `act` when the n-th batch is handled and about to be committed."""

    def __init__(self, batch: int, act: Callable[[], None]) -> None:
        self._batch, self._act, self._seen = batch, act, 0

    def __enter__(self) -> None:
        self._unsubscribe = events.subscribe(self._on_event)

    def __exit__(self, *_: object) -> None:
        self._unsubscribe()

    def _on_event(self, name: str, _fields: dict[str, object]) -> None:
        if name == "consume.handled":
            self._seen += 1
            if self._seen == self._batch:
                self._act()


def test_a_bouncer_restarted_while_workers_run(
    services: Addresses, database: Database, settings: Settings, topic_name: str
) -> None:
    make_ledger(database.engine)
    servers = settings.require_bootstrap_servers()
    with bouncer_before(services.database_url) as between:
        through = open_database(between.through(database.engine.url), Schema())
        with running(booking(through, settings, topic_name)):
            for round_number in range(3):
                produce(servers, topic_name, [(None, b'{"n": %d}' % n) for n in range(10)])
                done = 10 * (round_number + 1)
                eventually(lambda done=done: next_offsets(database) == [(0, done)], f"{done} processed")
                between.kill()
                between.start()
        through.engine.dispose()
    assert column(database.engine, 'SELECT "offset" FROM ledger ORDER BY id') == list(range(30))


def test_session_mode(services: Addresses, database: Database, settings: Settings, topic_name: str) -> None:
    make_ledger(database.engine)
    produce(settings.require_bootstrap_servers(), topic_name, [(None, b'{"n": %d}' % n) for n in range(30)])
    with bouncer_before(services.database_url, pool_mode="session") as between:
        through = open_database(between.through(database.engine.url), Schema())
        assert run_once(booking(through, settings, topic_name, max_batch=2)) == 0
        through.engine.dispose()
    assert next_offsets(database) == [(0, 30)]


# --- what cannot work is refused at the start ---


def test_a_mode_without_transactions_is_refused(services: Addresses, shell_at: Callable[[str], Shell]) -> None:
    """Seen to fail without PgBouncer's words in readiness.py: waits for ever, as if the server were away."""
    with bouncer_before(services.database_url, pool_mode="statement") as without:
        said = shell_at(without.url).run("db", "check", code=3).stderr
    assert "statement pooling mode" in said


@pytest.mark.parametrize("ignored", [False, True])
def test_options_that_do_not_get_through_are_refused(
    services: Addresses, shell_at: Callable[[str], Shell], ignored: bool
) -> None:
    """Told to ignore them, PgBouncer says nothing: search_path, for one, would be another. Seen to fail without
    `_refuse_dropped_options` in db/links.py.
    """
    more = {"ignore_startup_parameters": "options"} if ignored else {}
    with bouncer_before(services.database_url, **more) as without:
        asking = make_url(without.url).update_query_dict({"options": "-c search_path=mine -c statement_timeout=5000"})
        url = asking.render_as_string(hide_password=False)
        said = shell_at(url).run("db", "check", code=3).stderr
        expected = "search_path is 'public', not 'mine'" if ignored else "unsupported startup parameter"
        assert expected in said
        if ignored:
            agreed = make_url(without.url).update_query_dict({"options": "-c statement_timeout=0"})
            shell_at(agreed.render_as_string(hide_password=False)).run("db", "current")


@pytest.fixture
def shell_at(services: Addresses, nursery: Nursery, tmp_path: Path) -> Iterator[Callable[[str], Shell]]:
    """`eo` with this URL."""
    opened: list[Database] = []

    def at(url: str) -> Shell:
        opened.append(Database(create_engine(url), Schema()))
        settings = make_settings(url, services.bootstrap_servers)
        return Shell(nursery, opened[-1], settings, uuid.uuid4().hex[:10], tmp_path)

    yield at
    for database in opened:
        database.engine.dispose()
