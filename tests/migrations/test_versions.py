"""Upgrade, downgrade, current, check and sql, on a real database."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import Engine, create_engine, make_url, text

from eoframework.db import grants, migrating, readiness
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, EoError, NotFound, SchemaOutOfDate
from eoframework.schema import Schema
from eoframework.settings import environment
from tests.conftest import REPOSITORY, Addresses
from tests.migrations.conftest import AddVersion


def tables(engine: Engine, schema: str = "eo") -> set[str]:
    with engine.connect() as connection:
        found = connection.execute(
            text("SELECT tablename FROM pg_tables WHERE schemaname = :schema"), {"schema": schema}
        )
        return {row[0] for row in found} - {"alembic_version"}


def test_upgrade_check_downgrade(empty: Database) -> None:
    assert migrating.current(empty) is None
    with pytest.raises(SchemaOutOfDate, match="Run: eo db upgrade"):
        migrating.check(empty)
    assert migrating.upgrade(empty) == migrating.head()
    assert migrating.upgrade(empty) == migrating.head()
    assert migrating.check(empty) == migrating.head()
    assert tables(empty.engine) >= {"consumer", "position", "processed_message", "outbox_message", "relay_shard"}
    assert migrating.downgrade(empty, "base") is None
    assert tables(empty.engine) == set()
    assert migrating.upgrade(empty) == migrating.head()


def test_another_schema_name(empty: Database) -> None:
    other = replace(empty, schema=Schema("of_our_own"))
    migrating.upgrade(other)
    assert migrating.check(other) == migrating.head()
    assert "outbox_message" in tables(empty.engine, "of_our_own")
    assert tables(empty.engine, "eo") == set()
    with pytest.raises(SchemaOutOfDate):
        migrating.check(empty)
    migrating.upgrade(empty)
    migrating.downgrade(other, "base")
    assert migrating.check(empty) == migrating.head()


def test_deployments_at_once_apply_it_once(empty_url: str, empty: Database) -> None:
    """Seen to fail with the advisory lock in migrations/env.py removed: two of them create the same schema."""
    command = [sys.executable, "-m", "eoframework.cli", "db", "upgrade"]
    deployments = [
        subprocess.Popen(command, env=environment(EO_DATABASE_URL=empty_url), stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    endings = [(deployment.communicate(timeout=60)[1], deployment.returncode) for deployment in deployments]
    assert endings == [("", 0)] * 4
    assert migrating.check(empty) == migrating.head()
    with empty.engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM eo.outbox")) == 1


def test_an_upgrade_that_fails_halfway_leaves_nothing(empty: Database, add_version: AddVersion) -> None:
    """Seen to fail with `upgrade` on a connection in autocommit: the first version's tables stayed."""
    add_version("op.execute('CREATE TABLE eo.half (i int)'); op.execute('SELECT 1/0')")
    with pytest.raises(EoError, match="division by zero"):
        migrating.upgrade(empty)
    assert migrating.current(empty) is None
    assert tables(empty.engine) == set()


def test_an_older_schema_names_the_command(database: Database, add_version: AddVersion) -> None:
    add_version("op.execute('CREATE TABLE eo.next (i int)')")
    with pytest.raises(SchemaOutOfDate, match=r"at version eo0004, this code needs eo0005.*Run: eo db upgrade"):
        migrating.check(database)
    assert migrating.upgrade(database) == "eo0005"
    assert migrating.check(database) == "eo0005"


def test_a_newer_schema_is_left_alone(database: Database) -> None:
    with database.begin("test") as connection:
        connection.execute(text("UPDATE eo.alembic_version SET version_num = 'eo9999'"))
    for action in (
        lambda: migrating.check(database),
        lambda: migrating.upgrade(database),
        lambda: migrating.downgrade(database, "base"),
    ):
        with pytest.raises(SchemaOutOfDate, match=r"newer eoframework.*pip install --upgrade eoframework") as raised:
            action()
        assert raised.value.exit_code == 3
    assert "outbox_message" in tables(database.engine)


def test_an_unknown_version_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound, match="eo7777"):
        migrating.upgrade(database, "eo7777")


def test_the_printed_sql_makes_the_same_tables(empty: Database) -> None:
    printed = migrating.sql(Schema("by_dba"))
    assert 'CREATE SCHEMA IF NOT EXISTS "by_dba"' in printed
    assert "by_dba.alembic_version" in printed
    raw = empty.engine.raw_connection()
    raw.cursor().execute(printed)
    raw.close()
    assert migrating.check(replace(empty, schema=Schema("by_dba"))) == migrating.head()


def test_alembic_in_the_repository(empty_url: str, empty: Database) -> None:
    def alembic(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=REPOSITORY,
            env=environment(EO_DATABASE_URL=empty_url),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    alembic("upgrade", "head")
    assert migrating.check(empty) == migrating.head()
    assert migrating.head() in alembic("current")
    assert 'CREATE TABLE "eo".position' in alembic("upgrade", "head", "--sql")
    alembic("downgrade", "base")
    assert tables(empty.engine) == set()


def test_going_back_is_refused_while_messages_would_be_lost(database: Database) -> None:
    """Seen to fail without the DO block in 0002's downgrade: the parked message was gone."""
    with database.begin("test") as connection:
        connection.execute(
            text("""
            WITH c AS (INSERT INTO eo.consumer (name, topic) VALUES ('a.b', 't') RETURNING id)
            INSERT INTO eo.dead_letter (origin, consumer_id, topic_id, partition, "offset", message_id, topic,
                timestamp, created_at, cause)
            SELECT 'handler', id, gen_random_uuid(), 0, 0, gen_random_uuid(), 't', 0, now(), 'x' FROM c""")
        )
    with pytest.raises(EoError, match="going back would lose them"):
        migrating.downgrade(database, "eo0001")
    assert migrating.check(database) == migrating.head()
    with database.begin("test") as connection:
        connection.execute(text("DELETE FROM eo.dead_letter"))
    assert migrating.downgrade(database, "eo0001") == "eo0001"
    assert migrating.upgrade(database) == migrating.head()


def test_ids_from_before_are_no_younger_than_they_are(database: Database) -> None:
    """By them it is told whether a dead letter may be replayed. Seen to fail with now() for 'epoch' in 0002."""
    migrating.downgrade(database, "eo0001")
    record = text("""
        INSERT INTO eo.processed_message (consumer_id, message_id) SELECT id, gen_random_uuid() FROM eo.consumer""")
    with database.begin("test") as connection:
        connection.execute(text("INSERT INTO eo.consumer (name, topic) VALUES ('a.b', 't')"))
        connection.execute(record)
    migrating.upgrade(database)
    with database.begin("test") as connection:
        assert connection.execute(text("SELECT first_at < processed_at FROM eo.processed_message")).scalar_one()
        connection.execute(text("DELETE FROM eo.processed_message"))
        connection.execute(record)
        assert connection.execute(text("SELECT first_at = processed_at FROM eo.processed_message")).scalar_one()


class TestWithoutRights:
    """A role that owns nothing, as in most production databases."""

    @pytest.fixture
    def role(self, services: Addresses) -> Iterator[str]:
        name = f"eo_role_{uuid.uuid4().hex[:12]}"
        admin = create_engine(make_url(services.database_url), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE ROLE {name} LOGIN PASSWORD 'pw_{name}'"))
        yield name
        with admin.connect() as connection:
            connection.execute(text(f"DROP ROLE {name}"))
        admin.dispose()

    @pytest.fixture
    def theirs(self, database: Database, role: str) -> Iterator[Database]:
        url = database.engine.url.set(username=role, password=f"pw_{role}")
        engine = create_engine(url)
        yield replace(database, engine=engine)
        engine.dispose()
        with database.begin("test") as connection:
            connection.execute(text(f"DROP OWNED BY {role}"))

    def test_missing_rights_are_named_with_the_grant(self, database: Database, theirs: Database, role: str) -> None:
        with pytest.raises(ConfigurationError, match=f"may not read.*eo db grants --app {role} --apply"):
            migrating.check(theirs)
        with pytest.raises(ConfigurationError, match=f"USAGE on schema eo.*eo db grants --app {role} --apply"):
            readiness.check_rights(theirs)
        with database.begin("test") as connection:
            connection.execute(text(f"GRANT USAGE ON SCHEMA eo TO {role}"))
            connection.execute(text(f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA eo TO {role}"))
        with pytest.raises(ConfigurationError, match=r"DELETE on attempt.*eo db grants"):
            readiness.check_rights(theirs)
        grants.apply(database, grants.Roles(app=role))
        readiness.check_rights(theirs)

    def test_a_schema_made_by_a_dba_needs_no_right_to_make_one(
        self, database: Database, theirs: Database, role: str
    ) -> None:
        """Seen to fail with `CREATE SCHEMA IF NOT EXISTS` in migrations/env.py: permission denied for database."""
        with database.begin("test") as connection:
            connection.execute(text(f"CREATE SCHEMA given AUTHORIZATION {role}"))
        migrating.upgrade(replace(theirs, schema=Schema("given")))
        assert migrating.check(replace(theirs, schema=Schema("given"))) == migrating.head()
