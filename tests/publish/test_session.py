"""Publishing into a SQLAlchemy Session: with its transaction, its savepoints, and the one it is joined to."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, create_engine, exc, text
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from eoframework import App, ConfigurationError, EncodeError
from eoframework.clock import now
from tests.publish.conftest import Item, Names, Published, event, events


def test_a_commit_writes_effects_and_messages_together(
    app: App, engine: Engine, published: Published, items: Names
) -> None:
    """Fails without the listener on the engine's `commit` event (db/publishing.py, `_LISTENERS`)."""
    with Session(engine) as session, session.begin():
        session.add(Item(id=1, name="one"))
        app.publish(session, events, event(1))
        app.publish(session, events, event(2))
        assert published() == []
    assert published() == [1, 2]
    assert items() == ["one"]


def test_a_rollback_drops_effects_and_messages(app: App, engine: Engine, published: Published) -> None:
    """Fails when the `begin` listener is removed: the next commit would write the dropped message."""
    with engine.connect() as connection, Session(connection, join_transaction_mode="control_fully") as session:
        app.publish(session, events, event(1))
        session.rollback()
        app.publish(session, events, event(2))
        session.commit()
        connection.commit()
    assert published() == [2]


def test_nothing_is_published_when_the_user_s_flush_fails(app: App, engine: Engine, published: Published) -> None:
    with Session(engine) as session:
        session.add_all([Item(id=1, name="same"), Item(id=2, name="same")])
        app.publish(session, events, event(1))
        with pytest.raises(exc.IntegrityError):
            session.commit()
        session.rollback()
        app.publish(session, events, event(2))
        session.commit()
    assert published() == [2]


def test_a_session_is_used_again_after_its_commit(app: App, engine: Engine, published: Published) -> None:
    with Session(engine) as session:
        for n in (1, 2, 3):
            app.publish(session, events, event(n))
            session.commit()
    assert published() == [1, 2, 3]


def test_a_savepoint_takes_its_messages_along_when_rolled_back(app: App, engine: Engine, published: Published) -> None:
    """Fails when `_on_rollback_savepoint` keeps everything."""
    with Session(engine) as session, session.begin():
        app.publish(session, events, event(1))
        with session.begin_nested():
            app.publish(session, events, event(2))
        undone = session.begin_nested()
        app.publish(session, events, event(3))
        with session.begin_nested():
            app.publish(session, events, event(4))
        undone.rollback()
        app.publish(session, events, event(5))
        with session.begin_nested():
            inner = session.begin_nested()
            app.publish(session, events, event(6))
            inner.rollback()
            app.publish(session, events, event(7))
    assert published() == [1, 2, 5, 7]


def test_an_error_caught_around_a_savepoint_leaves_the_rest(
    app: App, engine: Engine, published: Published, items: Names
) -> None:
    with Session(engine) as session, session.begin():
        session.add(Item(id=1, name="one"))
        app.publish(session, events, event(1))
        savepoint = session.begin_nested()
        app.publish(session, events, event(2))
        session.add(Item(id=2, name="one"))
        with pytest.raises(exc.IntegrityError):
            savepoint.commit()
        savepoint.rollback()
    assert published() == [1]
    assert items() == ["one"]


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"])
def test_a_joined_session_publishes_with_the_outer_transaction(
    app: App, engine: Engine, published: Published, mode: str
) -> None:
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode=mode) as session:  # type: ignore[arg-type]
            session.add(Item(id=1, name="one"))
            app.publish(session, events, event(1))
            session.commit()
        # control_fully is the mode in which the Session's commit is the connection's.
        assert published() == ([1] if mode == "control_fully" else [])
        assert _advisory_locks(engine) == 0
        if mode != "control_fully":
            outer.commit()
    assert published() == [1]


@pytest.mark.parametrize("mode", ["conditional_savepoint", "rollback_only", "create_savepoint"])
def test_a_joined_session_s_message_is_lost_with_the_outer_transaction(
    app: App, engine: Engine, published: Published, mode: str
) -> None:
    with engine.connect() as connection:
        outer = connection.begin()
        with Session(connection, join_transaction_mode=mode) as session:  # type: ignore[arg-type]
            app.publish(session, events, event(1))
            session.commit()
        outer.rollback()
        app.publish(connection, events, event(2))
        connection.commit()
    assert published() == [2]


def test_a_session_joined_by_savepoint_rolls_back_only_its_own(app: App, engine: Engine, published: Published) -> None:
    """The outer connection published before and after; only the Session's message goes."""
    with engine.begin() as connection:
        app.publish(connection, events, event(1))
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            app.publish(session, events, event(2))
            session.rollback()
            app.publish(session, events, event(3))
            session.commit()
        app.publish(connection, events, event(4))
    assert published() == [1, 3, 4]


def test_no_key_lock_is_held_after_a_savepoint_is_released(app: App, engine: Engine, published: Published) -> None:
    """Fails with the insert in a Session's `before_commit` hook: it fires at the release, and the lock is held on."""
    with Session(engine) as session, session.begin():
        with session.begin_nested():
            app.publish(session, events, event(1))
        assert _advisory_locks(engine) == 0
    assert published() == [1]


def test_messages_published_by_the_session_s_own_hooks_are_written(
    app: App, engine: Engine, published: Published
) -> None:
    """before_flush and after_flush run during commit, after the first before_commit hook."""
    with Session(engine) as session:

        @sqlalchemy_event.listens_for(session, "before_flush")
        def before(session: Session, *_: object) -> None:
            app.publish(session, events, event(1))

        @sqlalchemy_event.listens_for(session, "after_flush")
        def after(session: Session, *_: object) -> None:
            app.publish(session, events, event(2))

        @sqlalchemy_event.listens_for(session, "before_commit")
        def commit(session: Session) -> None:
            app.publish(session, events, event(0))

        session.add(Item(id=1, name="one"))
        session.commit()
    assert published() == [0, 1, 2]


def test_a_commit_listener_of_the_user_s_may_publish(app: App, engine: Engine, published: Published) -> None:
    """It is called after ours, so its message would be kept for ever. Fails without `_Buffer.written`."""
    with Session(engine) as session:
        app.publish(session, events, event(1))
        sqlalchemy_event.listen(engine, "commit", lambda c: app.publish(c, events, event(2)), once=True)
        session.commit()
        session.commit()
    assert published() == [1, 2]


def test_an_encode_error_comes_at_the_call_and_publishes_nothing(
    app: App, engine: Engine, published: Published
) -> None:
    with Session(engine) as session, session.begin():
        app.publish(session, events, event(1))
        with pytest.raises(EncodeError, match="allowed are"):
            app.publish(session, events, event(2) | {"text": "x" * 2_000_000})
        with pytest.raises(EncodeError, match="Unable to serialize"):
            app.publish(session, events, event(3) | {"k": object()})
    assert published() == [1]


def test_two_phase_sessions_are_refused(app: App, engine: Engine) -> None:
    with Session(engine, twophase=True) as session, pytest.raises(ConfigurationError, match="two-phase"):
        app.publish(session, events, event(1))


def test_an_autocommit_engine_is_refused(app: App, engine: Engine) -> None:
    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(autocommit) as session, pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        app.publish(session, events, event(1))


def test_a_session_with_an_engine_per_table_is_refused_and_its_connection_taken(
    app: App, engine: Engine, published: Published
) -> None:
    with Session(binds={Item: engine}) as session, session.begin():
        with pytest.raises(ConfigurationError, match="no single engine"):
            app.publish(session, events, event(1))
        app.publish(session.connection(bind_arguments={"mapper": Item}), events, event(2))
    assert published() == [2]


def test_a_scoped_session_is_a_session(app: App, engine: Engine, published: Published) -> None:
    scoped = scoped_session(sessionmaker(engine))
    app.publish(scoped, events, event(1))
    scoped.commit()
    scoped.remove()
    assert published() == [1]


def test_a_failing_insert_rolls_the_user_s_effects_back(
    app: App, engine: Engine, published: Published, items: Names
) -> None:
    """The outbox cannot be written: the transaction fails as a whole, and later ones have no part of it.

    Fails without the rollback in `_on_commit`: SQLAlchemy sends none, and the next COMMIT keeps the effects.
    """
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE eo.outbox_message RENAME TO hidden"))
    with engine.connect() as connection:
        connection.execute(text("INSERT INTO item VALUES (1, 'one')"))
        app.publish(connection, events, event(1))
        with pytest.raises(exc.ProgrammingError):
            connection.commit()
        connection.rollback()
        connection.execute(text("INSERT INTO item VALUES (2, 'two')"))
        connection.commit()
        connection.execute(text("ALTER TABLE eo.hidden RENAME TO outbox_message"))
        connection.commit()
    assert items() == ["two"]
    assert published() == []


def test_delayed_messages_wait_in_their_own_table(app: App, engine: Engine, published: Published) -> None:
    before = now()
    with Session(engine) as session, session.begin():
        app.publish(session, events, event(1), delay=3600)
        app.publish(session, events, event(2), deliver_at=before)
    with engine.connect() as connection:
        due = list(connection.execute(text("SELECT deliver_at FROM eo.delayed_message ORDER BY seq")).scalars())
    assert published() == []
    assert due[1] == before
    assert 3600 <= (due[0] - before).total_seconds() < 3700


def test_publishing_works_through_an_engine_with_other_options(app: App, engine: Engine, published: Published) -> None:
    """An option engine shares its parent's listeners; the same message must not be written twice."""
    optioned = engine.execution_options(stream_results=False)
    for one in (engine, optioned, engine):
        with Session(one) as session, session.begin():
            app.publish(session, events, event(1))
            with session.begin_nested() as savepoint:
                app.publish(session, events, event(2))
                savepoint.rollback()
    assert published() == [1, 1, 1]


def test_another_engine_of_the_same_database_needs_no_registration(
    app: App, database_url: str, published: Published
) -> None:
    other = create_engine(database_url)
    with Session(other) as session, session.begin():
        app.publish(session, events, event(1))
    other.dispose()
    assert published() == [1]


def _advisory_locks(engine: Engine) -> int:
    with engine.connect() as connection:
        query = """SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database
                    WHERE l.locktype = 'advisory' AND d.datname = current_database()"""
        return int(connection.execute(text(query)).scalar_one())
