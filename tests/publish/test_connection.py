"""Publishing into a bare Connection."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, text
from sqlalchemy import event as sqlalchemy_event

from eoframework import App, ConfigurationError
from tests.publish.conftest import Published, event, events


def test_begin_block(app: App, engine: Engine, published: Published) -> None:
    with engine.begin() as connection:
        app.publish(connection, events, event(1))
        assert published() == []
    assert published() == [1]


def test_commit_as_you_go_without_any_statement(app: App, engine: Engine, published: Published) -> None:
    """Fails without `connection.begin()` in `_keep`: commit() then has nothing to commit and fires no event."""
    with engine.connect() as connection:
        app.publish(connection, events, event(1))
        connection.commit()
        app.publish(connection, events, event(2))
        connection.rollback()
        app.publish(connection, events, event(3))
        connection.commit()
    assert published() == [1, 3]


def test_a_connection_closed_without_commit_publishes_nothing(app: App, engine: Engine, published: Published) -> None:
    """The pool hands the same connection to the next one, who must not inherit the message."""
    with engine.connect() as connection:
        app.publish(connection, events, event(1))
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
    assert published() == []


@pytest.mark.filterwarnings("ignore:nested transaction already deassociated")
def test_savepoints_ended_out_of_order(app: App, engine: Engine, published: Published) -> None:
    """The outer one is rolled back while the inner one is open: both go."""
    with engine.begin() as connection:
        outer = connection.begin_nested()
        app.publish(connection, events, event(1))
        connection.begin_nested()
        app.publish(connection, events, event(2))
        outer.rollback()
    assert published() == []


def test_a_savepoint_older_than_the_first_message(app: App, engine: Engine, published: Published) -> None:
    """It began before anybody listened."""
    with engine.begin() as connection:
        savepoint = connection.begin_nested()
        connection.begin_nested().commit()
        app.publish(connection, events, event(1))
        savepoint.rollback()
        app.publish(connection, events, event(2))
    assert published() == [2]


def test_a_lost_connection_keeps_nothing_for_the_next(app: App, engine: Engine, published: Published) -> None:
    with engine.connect() as connection:
        app.publish(connection, events, event(1))
        connection.invalidate()
        connection.rollback()
        app.publish(connection, events, event(2))
        connection.commit()
    assert published() == [2]


def test_autocommit_is_refused(app: App, engine: Engine) -> None:
    """Fails without the check in `_check_transaction`: the row would stand in the outbox whatever comes after."""
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with autocommit.connect() as connection, pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        app.publish(connection, events, event(1))


def test_two_phase_transactions_are_refused(app: App, engine: Engine) -> None:
    """Fails without the check in `_check_transaction`: no `commit` event comes, and the message would be lost."""
    with engine.connect() as connection:
        connection.begin_twophase()
        with pytest.raises(ConfigurationError, match="two-phase"):
            app.publish(connection, events, event(1))


def test_the_first_message_of_an_engine_published_by_a_commit_listener_is_not_lost_in_silence(
    app: App, engine: Engine, published: Published
) -> None:
    sqlalchemy_event.listen(engine, "commit", lambda c: app.publish(c, events, event(1)))
    with pytest.raises(RuntimeError), engine.begin() as connection:
        connection.execute(text("SELECT 1"))


def test_something_else_is_refused_by_name(app: App) -> None:
    with pytest.raises(ConfigurationError, match="publish into a str"):
        app.publish("session", events, event(1))  # type: ignore[arg-type]
