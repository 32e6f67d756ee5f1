"""What a handler may not do with its transaction, and what it may."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest
from pydantic import BaseModel
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from eoframework import App, Message, Retry, Topic, Tx, clock
from eoframework.db.session import Database, open_database
from eoframework.errors import ConfigurationError, FailClosed, HandlerMisuse
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.conftest import Addresses, database_named, make_settings
from tests.consume.harness import column, make_app, make_ledger, scalar
from tests.consume.rig import Rig

INSERT = text('INSERT INTO ledger (partition, "offset", note) VALUES (:p, :o, :n)')


class Entry(BaseModel):
    n: int


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    name: Mapped[str] = mapped_column(primary_key=True)


out = Topic("guards.out", Entry)


@pytest.fixture(scope="module")
def one_database(services: Addresses, template: str) -> Iterator[Database]:
    """One for the module: these tests are many, and copying a database takes longer than any of them."""
    with database_named(services, f"eo_guards_{uuid.uuid4().hex[:12]}", source=make_url(template).database) as url:
        opened = open_database(url, Schema())
        make_ledger(opened.engine)
        Base.metadata.create_all(opened.engine)
        yield opened
        opened.engine.dispose()


@pytest.fixture
def database(one_database: Database) -> Database:
    with one_database.engine.begin() as connection:
        for table in ("ledger", "account", "eo.outbox_message", "eo.processed_message", "eo.position"):
            connection.execute(text(f"DELETE FROM {table}"))
    return one_database


@pytest.fixture
def settings(services: Addresses, database: Database) -> Settings:
    return make_settings(database.engine.url.render_as_string(hide_password=False), services.bootstrap_servers)


@pytest.fixture
def app(settings: Settings, database: Database) -> App:
    return make_app(settings, database)


def rig_of(app: App, misuse: Callable[[Tx], object], *, budget: float = 60, retry: Retry | None = None) -> Rig:
    """Books every message; at n = 1 it then misbehaves."""

    @app.handler(Topic("guards.in", Entry), name="book", retry=retry)
    def book(message: Message[Entry], tx: Tx) -> None:
        tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(message.payload.n)})
        if message.payload.n == 1:
            misuse(tx)

    return Rig(app, budget=budget)


def three(rig: Rig) -> list[bytes]:
    return [b'{"n": %d}' % n for n in range(3)]


def swallow_statement(tx: Tx) -> None:
    try:
        tx.session.execute(text("SELECT 1 / 0"))
    except DBAPIError:
        return


def swallow_flush(tx: Tx) -> None:
    tx.session.add(Account(name="same"))
    tx.session.flush()
    tx.session.expunge_all()
    tx.session.add(Account(name="same"))
    try:
        tx.session.flush()
    except IntegrityError:
        return


def execute(statement: str) -> Callable[[Tx], object]:
    return lambda tx: tx.session.execute(text(statement))


def session_begin(tx: Tx) -> None:
    with tx.session.begin():
        tx.session.execute(text("SELECT 1"))


MISUSES: dict[str, Callable[[Tx], object]] = {
    "a statement's error swallowed": swallow_statement,
    "a flush's error swallowed": swallow_flush,
    "session.commit": lambda tx: tx.session.commit(),
    "session.rollback": lambda tx: tx.session.rollback(),
    "session.close": lambda tx: tx.session.close(),
    "session.reset": lambda tx: tx.session.reset(),
    "with session.begin": session_begin,
    "connection.commit": lambda tx: tx.session.connection().commit(),
    "connection.rollback": lambda tx: tx.session.connection().rollback(),
    "connection.close": lambda tx: tx.session.connection().close(),
    **{
        statement: execute(statement)
        for statement in (
            "COMMIT",
            "ROLLBACK",
            "end",
            "abort",
            "commit and chain",
            "ROLLBACK WORK",
            "PREPARE TRANSACTION 'x'",
            "/* so */ COMMIT",
            "-- so\nCOMMIT",
            "; COMMIT",
            "SELECT 1; COMMIT",
            "SELECT 1; /* so */ ROLLBACK; BEGIN",
        )
    },
}


def swallowing(misuse: Callable[[Tx], object]) -> Callable[[Tx], object]:
    def swallow(tx: Tx) -> None:
        try:
            misuse(tx)
        except Exception:  # noqa: BLE001 - what a careless handler does
            return

    return swallow


def parked(app: App) -> list[int]:
    """The offsets this app's handler has set aside; the database is shared."""
    return column(
        app.database.engine,
        """SELECT "offset" FROM eo.parked_message m JOIN eo.consumer c ON c.id = consumer_id WHERE c.name = :name""",
        name=app.handlers[0].group,
    )


@pytest.mark.parametrize("misuse", list(MISUSES))
def test_a_handler_that_tampers_with_its_transaction_fails_alone(app: App, misuse: str) -> None:
    """Seen to fail, each for its case, without `check_intact` after the call (HandlerCalls._call), `_guard_commit`,
    either half of `_guard_statement`, the loop that forbids methods of the Session, the line that forbids the
    Connection's `close`, and the driver's rollback in `_roll_back`.
    """
    rig = rig_of(app, MISUSES[misuse])
    outcome = rig.run([rig.record(value) for value in three(rig)])
    assert outcome.moved == {0: 1}
    assert outcome.failed[0].record.offset == 1
    assert outcome.trouble is None
    if misuse != "with session.begin":
        assert isinstance(outcome.failed[0].error, HandlerMisuse)
    assert column(app.database.engine, "SELECT note FROM ledger") == ["0"]
    assert rig.positions() == [1, 0, 0]


@pytest.mark.parametrize("misuse", list(MISUSES))
def test_a_handler_that_tampers_inside_a_savepoint_is_set_aside_alone(app: App, misuse: str) -> None:
    """After a failure a batch runs with savepoints, and the same guards hold inside them.

    Seen to fail with `check_intact` taken out of HandlerCalls._call: what was swallowed counted as done.
    """
    rig = rig_of(app, MISUSES[misuse], retry=Retry())
    outcome = rig.run([rig.record(value) for value in three(rig)])
    assert (outcome.moved, outcome.failed, outcome.parked) == ({0: 3}, {}, 1)
    assert column(app.database.engine, "SELECT note FROM ledger ORDER BY id") == ["0", "2"]
    assert parked(app) == [1]


@pytest.mark.parametrize("retry", [None, Retry()], ids=["stops", "parks"])
@pytest.mark.parametrize("misuse", list(MISUSES))
def test_effects_and_position_agree_although_the_handler_swallows_what_the_guards_raise(
    app: App, misuse: str, retry: Retry | None
) -> None:
    """Seen to fail without `check_intact` (positions and effects differed), `_guard_commit` and `_guard_statement`."""
    rig = rig_of(app, swallowing(MISUSES[misuse]), retry=retry)
    outcome = rig.run([rig.record(value) for value in three(rig)])
    assert outcome.trouble is None
    assert rig.booked() + len(parked(app)) == rig.positions()[0] == outcome.moved[0]
    rest = rig.run([rig.record(b'{"n": 5}', partition=1)])
    assert rest.moved == {1: 1}, "and the next batch runs as if nothing had been"


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_a_transaction_ended_past_every_guard_stops_the_consumer(app: App, end: str) -> None:
    """Seen to fail without the FailClosed in WorkerConnection.check_intact: reported as the message's failure, the
    batch ran again, found the position moved, gave way, and skipped the messages after the culprit.
    """

    def tamper(tx: Tx) -> None:
        driver = tx.session.connection().connection.dbapi_connection
        assert driver is not None
        getattr(driver, end)()

    rig = rig_of(app, tamper)
    with pytest.raises(FailClosed, match="past every guard"):
        rig.run([rig.record(value) for value in three(rig)])


def test_savepoints_are_allowed_and_take_along_what_was_published_inside(app: App) -> None:
    def in_savepoints(tx: Tx) -> None:
        tx.session.add(Account(name="kept"))
        with tx.session.begin_nested():
            tx.publish(out, Entry(n=1))
        try:
            with tx.session.begin_nested():
                tx.publish(out, Entry(n=2))
                tx.session.execute(text("INSERT INTO account VALUES ('kept')"))
        except IntegrityError:
            tx.publish(out, Entry(n=3))

    rig = rig_of(app, in_savepoints)
    assert rig.run([rig.record(value) for value in three(rig)]).moved == {0: 3}
    assert column(app.database.engine, "SELECT name FROM account") == ["kept"]
    assert column(app.database.engine, "SELECT convert_from(payload, 'utf8') FROM eo.outbox_message ORDER BY seq") == [
        '{"n":1}',
        '{"n":3}',
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_all_ways_to_publish_share_the_unit_of_work(app: App, fails: bool) -> None:
    def publish(tx: Tx) -> None:
        tx.publish(out, Entry(n=10))
        app.publish(tx.session, out, Entry(n=11))
        app.publish(tx.session.connection(), out, Entry(n=12))
        if fails:
            raise ValueError("after publishing")

    rig = rig_of(app, publish)
    rig.run([rig.record(value) for value in three(rig)])
    published = column(app.database.engine, "SELECT convert_from(payload, 'utf8') FROM eo.outbox_message")
    assert sorted(published) == ([] if fails else ['{"n":10}', '{"n":11}', '{"n":12}'])
    assert rig.booked() == (1 if fails else 3)


class Routing(Session):
    """Reads and writes elsewhere, as a setup with replicas does."""

    elsewhere = None

    def get_bind(self, *_: object, **__: object) -> object:  # type: ignore[override]
        return self.elsewhere


@pytest.mark.parametrize(
    "options",
    [
        {"binds": {Account: None}},
        {"class_": Routing},
        {"twophase": True},
        {"autobegin": False},
        {"autoflush": False, "expire_on_commit": False},
        {"join_transaction_mode": "control_fully"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_any_session_factory_writes_into_the_one_transaction(
    settings: Settings, database: Database, app: App, options: dict[str, object]
) -> None:
    """Seen to fail without `get_bind`, `twophase=False` and `join_transaction_mode` in handler_session, each for its
    case: rows of two transactions, or nothing worked.
    """
    other = create_engine(database.engine.url)
    Routing.elsewhere = other  # type: ignore[assignment]
    if "binds" in options:
        options = {"binds": {Account: other}}
    factory = sessionmaker(database.engine, **options)
    mine = App("app", engine=database.engine, session_factory=factory, settings=settings)
    rig = rig_of(mine, lambda tx: tx.session.add(Account(name="one")))
    assert rig.run([rig.record(value) for value in three(rig)]).moved == {0: 3}
    tables = ("account", "ledger", "eo.position WHERE next_offset = 3")
    written_by = column(database.engine, " UNION ALL ".join(f"SELECT xmin::text FROM {table}" for table in tables))
    assert len(written_by) == 5
    assert len(set(written_by)) == 1, "one transaction"
    other.dispose()


@pytest.mark.parametrize("how", ["engine", "options"])
def test_an_engine_in_autocommit_is_refused(settings: Settings, database: Database, app: App, how: str) -> None:
    """Seen to fail with Connection.get_isolation_level() asked instead of the driver: it says READ COMMITTED."""
    url = database.engine.url
    plain = create_engine(url)
    engine = (
        create_engine(url, isolation_level="AUTOCOMMIT")
        if how == "engine"
        else plain.execution_options(isolation_level="AUTOCOMMIT")
    )
    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        rig_of(App("auto", engine=engine, settings=settings), lambda tx: None)
    engine.dispose()


def test_a_batch_out_of_time_commits_what_was_run_and_forgets_the_ids_of_the_rest(app: App) -> None:
    """Seen to fail with `_cut` not forgetting the ids (messages taken for duplicates and never run) and not moving the
    positions back (messages skipped). The time runs out inside the handler: a batch whose time is over before it begins
    is one message, and has no rest.
    """
    rig = rig_of(app, lambda tx: clock.sleep(0.04), budget=0.05)
    spoken = [(0, "a"), (1, "b"), (0, "a"), (1, "b"), (0, "c"), (1, None), (0, "b"), (2, "d")]
    waiting = [rig.record(b'{"n": 1}', partition=partition, identity=identity) for partition, identity in spoken]
    for _ in range(len(spoken)):
        assert not rig.run(waiting).failed
        waiting = [record for record in waiting if record.offset >= rig.claims[record.partition].next_offset]
        remembered = scalar(app.database.engine, "SELECT count(*) FROM eo.processed_message")
        assert remembered <= rig.booked()
        if not waiting:
            break
    assert waiting == []
    assert rig.positions() == [4, 3, 1]
    booked = column(app.database.engine, """SELECT partition || '@' || "offset" FROM ledger ORDER BY id""")
    assert booked == ["0@0", "1@0", "0@2", "1@2", "2@0"]
