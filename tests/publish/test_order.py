"""Order of a key, and what two writers do to each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from sqlalchemy import Connection, Engine, exc, text
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.orm import Session

from eoframework import App, clock
from eoframework.keys import order_bucket
from tests.publish.conftest import Item, Names, Published, event, events

DEADLINE = 20.0


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


class Gate:
    """Holds the transactions marked with `hold` between their outbox rows and their COMMIT."""

    def __init__(self, engine: Engine, app: App) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        # The outbox's own listener comes first only if it was there first.
        with engine.connect() as connection:
            app.publish(connection, events, event(0))
            connection.rollback()
        sqlalchemy_event.listen(engine, "commit", self._wait)

    def _wait(self, connection: Connection) -> None:
        if connection.get_execution_options().get("hold"):
            self.reached.set()
            assert self.open.wait(DEADLINE)


def test_the_second_writer_of_a_key_waits_for_the_first_one_s_commit(
    app: App, engine: Engine, published: Published, threads: ThreadPoolExecutor
) -> None:
    """So the order of `seq` is the order of commits, and a relay never sees the later one first.

    Fails without the advisory lock in db/outbox.py: the second one is committed and visible while the first is not.
    """
    gate = Gate(engine, app)
    first = threads.submit(_write, app, engine, event(1), hold=True)
    assert gate.reached.wait(DEADLINE)
    second = threads.submit(_write, app, engine, event(2))
    _until(lambda: _waiting(engine) == 1 or second.done())
    assert published() == []
    gate.open.set()
    _all_done(first, second)
    assert published() == [1, 2]


def test_commit_order_counts_not_the_order_of_publishing(app: App, engine: Engine, published: Published) -> None:
    """Two open transactions of one key do not wait for each other before they commit."""
    with Session(engine) as early, Session(engine) as late:
        app.publish(early, events, event(1))
        app.publish(late, events, event(2))
        late.commit()
        early.commit()
    assert published() == [2, 1]


def test_other_keys_and_messages_without_a_key_do_not_wait(
    app: App, engine: Engine, published: Published, threads: ThreadPoolExecutor
) -> None:
    """A lower `seq` may become visible later than a higher one: the relay chooses rows by state, not by a cursor."""
    gate = Gate(engine, app)
    first = threads.submit(_write, app, engine, event(1, key="a"), hold=True)
    assert gate.reached.wait(DEADLINE)
    _write(app, engine, event(2, key="b"))
    assert published() == [2]
    gate.open.set()
    _all_done(first)
    assert published() == [1, 2]


def test_a_delayed_message_leaves_its_key_s_order(app: App, engine: Engine, threads: ThreadPoolExecutor) -> None:
    gate = Gate(engine, app)
    first = threads.submit(_write, app, engine, event(1), hold=True)
    assert gate.reached.wait(DEADLINE)
    with Session(engine) as session, session.begin():
        app.publish(session, events, event(2), delay=60)
    assert not first.done()
    gate.open.set()
    _all_done(first)


def test_a_deferred_constraint_is_checked_before_the_key_lock(
    app: App, engine: Engine, published: Published, items: Names, threads: ThreadPoolExecutor
) -> None:
    """The second writer's deferred check waits for the first writer, who then wants the key: a deadlock if the second
    one held the key already. Fails without SET CONSTRAINTS in db/outbox.py.
    """
    _defer_the_unique_name(engine)
    first, second = Session(engine), Session(engine)
    first.add(Item(id=1, name="same"))
    first.flush()
    app.publish(first, events, event(1))
    second.add(Item(id=2, name="same"))
    second.flush()
    app.publish(second, events, event(2))
    waiting = threads.submit(second.commit)
    _until(lambda: _waiting(engine) == 1)
    first.commit()
    with pytest.raises(exc.IntegrityError):
        waiting.result(DEADLINE)
    first.close()
    second.close()
    assert (published(), items()) == ([1], ["same"])


def test_the_last_flush_comes_before_the_key_lock(
    app: App, engine: Engine, published: Published, threads: ThreadPoolExecutor
) -> None:
    """The first writer's last flush waits for a row of the second, who then wants the key.

    Fails with the insert in a Session's `before_commit` hook, which is before that flush: deadlock.
    """
    with Session(engine) as session, session.begin():
        session.add(Item(id=1, name="one"))
    first, second = Session(engine), Session(engine)
    changed = first.get_one(Item, 1)
    changed.name = "first"
    app.publish(first, events, event(1), key="a")
    second.get_one(Item, 1, with_for_update=True).name = "second"
    app.publish(second, events, event(2), key="a")
    waiting = threads.submit(first.commit)
    _until(lambda: _waiting(engine) == 1)
    second.commit()
    waiting.result(DEADLINE)
    first.close()
    second.close()
    assert published() == [2, 1]


def test_writers_of_the_same_keys_in_opposite_order_do_not_deadlock(
    app: App, engine: Engine, published: Published, threads: ThreadPoolExecutor
) -> None:
    """A third writer holds the key in the middle until both wait, each with its first key locked if it took that first.

    Fails when the buckets are not sorted in db/outbox.py: 40P01.
    """
    keys = ["a", "m", "z"]
    assert len({order_bucket(key.encode()) for key in keys}) == 3

    def write(n: int, order: list[str]) -> None:
        with Session(engine) as session, session.begin():
            for key in order:
                app.publish(session, events, event(n, key=key))

    gate = Gate(engine, app)
    middle = threads.submit(_write, app, engine, event(0, key="m"), hold=True)
    assert gate.reached.wait(DEADLINE)
    first, second = threads.submit(write, 1, keys), threads.submit(write, 2, keys[::-1])
    _until(lambda: _waiting(engine) == 2)
    gate.open.set()
    _all_done(middle, first, second)
    assert sorted(published()) == [0, 1, 1, 1, 2, 2, 2]


def _write(app: App, engine: Engine, payload: dict[str, object], *, hold: bool = False) -> None:
    with engine.execution_options(hold=hold).connect() as connection:
        app.publish(connection, events, payload)
        connection.commit()


def _waiting(engine: Engine) -> int:
    """How many backends of this database wait for a lock."""
    query = """SELECT count(DISTINCT a.pid) FROM pg_stat_activity a
                WHERE a.datname = current_database() AND cardinality(pg_blocking_pids(a.pid)) > 0"""
    with engine.connect() as connection:
        return int(connection.execute(text(query)).scalar_one())


def _until(condition: Callable[[], bool]) -> None:
    deadline = clock.monotonic() + DEADLINE
    while not condition():
        assert clock.monotonic() < deadline
        clock.sleep(0.01)


def _all_done(*futures: Future[None]) -> None:
    for future in futures:
        future.result(DEADLINE)


def _defer_the_unique_name(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE item DROP CONSTRAINT item_name_key"))
        connection.execute(text("ALTER TABLE item ADD UNIQUE (name) DEFERRABLE INITIALLY DEFERRED"))
