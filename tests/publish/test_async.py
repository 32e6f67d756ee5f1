"""Publishing into AsyncSession and AsyncConnection: the same rules, and no await."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import Engine, text
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session

from eoframework import App, ConfigurationError
from tests.publish.conftest import Item, Names, Published, event, events

Body = Callable[[AsyncEngine], Awaitable[None]]
Run = Callable[[Body], None]


@pytest.fixture
def run(engine: Engine, database_url: str) -> Run:
    """Run a coroutine with an async engine of its own event loop."""

    async def with_engine(body: Body) -> None:
        opened = create_async_engine(database_url)
        try:
            await body(opened)
        finally:
            await opened.dispose()

    return lambda body: asyncio.run(with_engine(body))


def test_commit_rollback_and_reuse(app: App, run: Run, published: Published, items: Names) -> None:
    """Fails without `_AsyncBuffer._before_commit`."""

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            app.publish(session, events, event(1))
            await session.commit()
            session.add(Item(id=1, name="one"))
            app.publish(session, events, event(2))
            await session.rollback()
            session.add(Item(id=2, name="two"))
            app.publish(session, events, event(3))
            await session.commit()

    run(body)
    assert published() == [1, 3]
    assert items() == ["two"]


def test_savepoints(app: App, run: Run, published: Published) -> None:
    """Fails when `SessionBuffer._released` or `_ended` does nothing: 2, 6 go missing or 3, 4, 5 appear."""

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session, session.begin():
            app.publish(session, events, event(1))
            async with session.begin_nested():
                app.publish(session, events, event(2))
            undone = await session.begin_nested()
            app.publish(session, events, event(3))
            async with session.begin_nested():
                app.publish(session, events, event(4))
                await session.execute(text("SELECT 1"))
            await undone.rollback()
            async with session.begin_nested():
                inner = await session.begin_nested()
                app.publish(session, events, event(5))
                await inner.rollback()
                app.publish(session, events, event(6))
            app.publish(session, events, event(7))

    run(body)
    assert published() == [1, 2, 6, 7]


def test_a_transaction_committed_with_an_open_savepoint(app: App, run: Run, published: Published) -> None:
    """The outer `before_commit` then comes while the savepoint is still open, and never again."""

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:
            outer = await session.begin()
            app.publish(session, events, event(1))
            await session.begin_nested()
            app.publish(session, events, event(2))
            await outer.commit()

    run(body)
    assert published() == [1, 2]


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only", "create_savepoint"])
def test_joined_to_an_outer_transaction(app: App, run: Run, published: Published, mode: str) -> None:
    """Fails without `_AsyncBuffer._after_commit`: the Session ends, and nobody hands its messages on."""

    async def body(engine: AsyncEngine) -> None:
        async with engine.connect() as connection:
            for n, keep in ((1, True), (2, False), (3, True)):
                outer = await connection.begin()
                async with AsyncSession(connection, join_transaction_mode=mode) as session:
                    app.publish(session, events, event(n))
                    await session.commit()
                assert 1 not in published() or n > 1
                await (outer.commit() if keep else outer.rollback())

    run(body)
    assert published() == [1, 3]


def test_a_joined_session_inside_a_savepoint_of_the_connection(app: App, run: Run, published: Published) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            savepoint = await connection.begin_nested()
            async with AsyncSession(connection) as session:
                app.publish(session, events, event(1))
                await session.commit()
            await savepoint.rollback()
            app.publish(connection, events, event(2))

    run(body)
    assert published() == [2]


@pytest.mark.parametrize("end", ["left open", "closed", "rolled back"])
def test_a_joined_session_that_is_not_committed_publishes_if_its_effects_stay(
    app: App, run: Run, published: Published, items: Names, end: str
) -> None:
    """Effects and messages share their fate, in all of SQLAlchemy's ways of joining and leaving.

    Fails without `_hand_on` in `_after_transaction_end`, without `_attach` in `publish`, or without `_after_rollback`.
    """
    modes = ["conditional_savepoint", "rollback_only", "create_savepoint", "control_fully"]
    cases = list(itertools.product(modes, [True, False], [True, False]))

    async def one(engine: AsyncEngine, n: int, mode: str, in_savepoint: bool, asynchronous: bool) -> None:
        async with engine.connect() as connection:
            outer = await connection.begin()
            if in_savepoint:
                await connection.begin_nested()
            session = AsyncSession(connection, join_transaction_mode=mode)
            await session.execute(text("INSERT INTO item VALUES (:n, :name)"), {"n": n, "name": str(n)})
            if asynchronous:
                app.publish(session, events, event(n))
            else:
                await session.run_sync(lambda sync: app.publish(sync, events, event(n)))
            if end == "closed":
                await session.close()
            elif end == "rolled back":
                await session.rollback()
            if outer.is_active:
                await outer.commit()
            await session.close()

    async def body(engine: AsyncEngine) -> None:
        for n, case in enumerate(cases):
            await one(engine, n, *case)

    run(body)
    stayed = [int(name) for name in items()]
    assert {n: cases[n] for n in published()} == {n: cases[n] for n in stayed}
    assert len(stayed) < len(cases) if end != "left open" else len(stayed) == len(cases)


def test_connection_and_session_keep_the_order_of_publishing(app: App, run: Run, published: Published) -> None:
    """Fails when `_on_commit` does not sort by place."""

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session, session.begin():
            app.publish(session, events, event(1))
            app.publish(await session.connection(), events, event(2))
            app.publish(session, events, event(3))
            await session.run_sync(lambda sync: app.publish(sync, events, event(4)))
            app.publish(session, events, event(5))

    run(body)
    assert published() == [1, 2, 3, 4, 5]


def test_async_connection(app: App, run: Run, published: Published) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            app.publish(connection, events, event(1))
        async with engine.connect() as connection:
            app.publish(connection, events, event(2))
            await connection.commit()
            app.publish(connection, events, event(3))
            await connection.rollback()
        with pytest.raises(ConfigurationError, match="not connected"):
            app.publish(engine.connect(), events, event(4))

    run(body)
    assert published() == [1, 2]


def test_hooks_of_the_commit_may_publish(app: App, run: Run, published: Published) -> None:
    """Fails without `in_greenlet` in `publish`: the first message of a Session comes after the last before_commit."""

    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine) as session:

            @sqlalchemy_event.listens_for(session.sync_session, "after_flush")
            def after_flush(_: Session, __: object) -> None:
                app.publish(session, events, event(2))

            session.add(Item(id=1, name="one"))
            await session.commit()
            session.add(Item(id=2, name="two"))
            app.publish(session, events, event(1))
            await session.commit()

    run(body)
    assert published() == [2, 1, 2]


def test_autocommit_and_two_phase_are_refused(app: App, run: Run, published: Published) -> None:
    async def body(engine: AsyncEngine) -> None:
        autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        async with AsyncSession(autocommit) as session:
            app.publish(session, events, event(1))
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await session.commit()
        async with AsyncSession(engine, twophase=True) as session:
            with pytest.raises(ConfigurationError, match="two-phase"):
                app.publish(session, events, event(2))

    run(body)
    assert published() == []


def test_scoped_sessions(app: App, run: Run, published: Published) -> None:
    async def body(engine: AsyncEngine) -> None:
        scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)
        app.publish(scoped, events, event(1))
        await scoped.commit()
        await scoped.remove()

    run(body)
    assert published() == [1]


def test_a_session_without_autobegin_says_so(app: App, run: Run, published: Published) -> None:
    async def body(engine: AsyncEngine) -> None:
        async with AsyncSession(engine, autobegin=False) as session:
            with pytest.raises(ConfigurationError, match="has not begun"):
                app.publish(session, events, event(1))
            async with session.begin():
                app.publish(session, events, event(2))

    run(body)
    assert published() == [2]
