"""The server ends the connection under a transaction that publishes: the caller hears that, and not its aftermath."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from eoframework import App
from tests.publish.conftest import Published, events


@pytest.fixture
def small_pool(engine: Engine) -> Iterator[Engine]:
    """Whoever comes next gets the same connection, if it was put back."""
    pool = create_engine(engine.url, pool_size=1, max_overflow=0)
    yield pool
    pool.dispose()


def end(connection: Connection, engine: Engine) -> None:
    pid = connection.scalar(text("SELECT pg_backend_pid()"))
    with engine.begin() as other:
        other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})


def test_at_the_commit_of_a_session(app: App, engine: Engine, small_pool: Engine, published: Published) -> None:
    """Seen to fail with a ROLLBACK sent all the same: PendingRollbackError, which nobody who retries would expect."""

    def visit(n: int, *, cut: bool = False) -> None:
        with Session(small_pool) as session, session.begin():
            app.publish(session, events, {"k": "a", "n": n})
            if cut:
                end(session.connection(), engine)

    with pytest.raises(OperationalError):
        visit(1, cut=True)
    visit(2)
    assert published() == [2]


def test_at_the_commit_of_a_connection(app: App, engine: Engine, small_pool: Engine, published: Published) -> None:
    def visit(connection: Connection, n: int, *, cut: bool = False) -> None:
        with connection.begin():
            app.publish(connection, events, {"k": "a", "n": n})
            if cut:
                end(connection, engine)

    with small_pool.connect() as connection:
        with pytest.raises(OperationalError):
            visit(connection, 1, cut=True)
        visit(connection, 2)
    assert published() == [2]
