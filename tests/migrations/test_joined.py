"""Our versions inside a user's own alembic environment, made by `alembic init`."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, text

from eoframework.db import grants, migrating, readiness
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, SchemaOutOfDate
from eoframework.schema import Schema


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """The env.py that alembic makes configures logging, and switches every logger off that is there already."""
    root, known = logging.getLogger(), logging.Logger.manager.loggerDict
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger in known.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


METADATA = """import sqlalchemy as sa
from eoframework.alembic_env import include_object
target_metadata = sa.MetaData()
sa.Table("item", target_metadata, sa.Column("sku", sa.Text, primary_key=True))
"""


class Theirs:
    """The environment, as alembic's own commands see it."""

    def __init__(self, directory: Path, url: str, versions: str) -> None:
        self.ini, self.migrations = directory / "alembic.ini", directory / "migrations"
        command.init(Config(str(self.ini), stdout=io.StringIO()), str(self.migrations))
        lines = [line for line in self.ini.read_text().splitlines() if not line.startswith(("path_separator", "sqlal"))]
        where = lines.index("[alembic]") + 1
        lines[where:where] = [
            f"sqlalchemy.url = {url.replace('%', '%%')}",
            "path_separator = newline",
            "version_locations =",
            "    %(here)s/migrations/versions",
            f"    {versions}",
        ]
        self.ini.write_text("\n".join(lines))
        env = self.migrations / "env.py"
        code = env.read_text().replace("target_metadata = None\n", METADATA)
        before = "connection=connection, target_metadata=target_metadata"
        assert METADATA in code
        assert before in code
        env.write_text(code.replace(before, f"{before}, include_schemas=True, include_object=include_object"))

    def config(self) -> Config:
        return Config(str(self.ini), output_buffer=io.StringIO(), stdout=io.StringIO())

    def upgrade(self, revision: str = "heads") -> None:
        command.upgrade(self.config(), revision)

    def autogenerate(self, head: str = "shop@head") -> str:
        """The new version file's text."""
        first = {"branch_label": "shop", "version_path": str(self.migrations / "versions")} if head == "base" else {}
        script = command.revision(self.config(), "m", autogenerate=True, head=head, **first)  # type: ignore[arg-type]
        return Path(script.path).read_text()  # type: ignore[union-attr]


@pytest.fixture
def theirs(tmp_path: Path, empty_url: str, monkeypatch: pytest.MonkeyPatch) -> Theirs:
    monkeypatch.chdir(tmp_path)
    return Theirs(tmp_path, empty_url, str(migrating.location() / "versions"))


def tables(database: Database) -> set[str]:
    statement = "SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname !~ '^(pg_|information_schema)'"
    with database.engine.connect() as connection:
        return {row[0] for row in connection.execute(text(statement))}


def test_upgrade_heads_upgrades_both(theirs: Theirs, empty: Database) -> None:
    """Seen to fail without joined.now_at: `check` found no tables of eoframework."""
    theirs.upgrade()
    assert migrating.check(empty) == migrating.head()
    assert "sa.Column('sku'" in theirs.autogenerate("base")
    theirs.upgrade()
    assert {"public.item", "public.alembic_version", "eo.position"} <= tables(empty)
    with empty.engine.connect() as connection:
        heads = set(connection.execute(text("SELECT version_num FROM public.alembic_version")).scalars())
    assert len(heads) == 2
    assert migrating.head() in heads
    assert migrating.check(empty) == migrating.head()
    command.downgrade(theirs.config(), "eoframework@base")
    assert migrating.current(empty) is None
    assert tables(empty) >= {"public.item"}
    assert "eo.position" not in tables(empty)
    theirs.upgrade()
    assert migrating.check(empty) == migrating.head()


def test_autogenerate_leaves_our_tables_alone(theirs: Theirs) -> None:
    """Seen to fail with `return True` in include_object: the new version dropped every table of eoframework."""
    theirs.upgrade()
    theirs.autogenerate("base")
    theirs.upgrade()
    said = theirs.autogenerate()
    assert "drop_" not in said
    assert "create_" not in said
    assert said.count("pass") == 2


def test_autogenerate_with_our_tables_in_the_default_schema(
    theirs: Theirs, empty: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then both chains share one version table; what is the user's own there is still seen.

    Seen to fail with `return True` in include_object: our tables were dropped with it.
    """
    monkeypatch.setenv("EO_DATABASE_SCHEMA", "public")
    database = replace(empty, schema=Schema("public"))
    theirs.upgrade()
    theirs.autogenerate("base")
    theirs.upgrade()
    assert migrating.check(database) == migrating.head()
    with empty.begin("test") as connection:
        connection.execute(text("CREATE TABLE forgotten (i int)"))
    said = theirs.autogenerate()
    assert said.count("drop_table('forgotten')") == 1
    assert said.count("drop_") == 1
    with pytest.raises(ConfigurationError, match=r"public.alembic_version.*alembic upgrade heads"):
        migrating.downgrade(database, "base")


def test_a_schema_of_our_own(theirs: Theirs, empty: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EO_DATABASE_SCHEMA", "shop_eo")
    theirs.upgrade()
    theirs.autogenerate("base")
    theirs.upgrade()
    assert "drop_" not in theirs.autogenerate()
    assert migrating.check(replace(empty, schema=Schema("shop_eo"))) == migrating.head()
    assert not {name for name in tables(empty) if name.startswith("eo.")}


def test_eo_db_does_not_interfere(theirs: Theirs, empty: Database) -> None:
    """Seen to fail without the refusal: alembic ran the version again, and its tables were there already."""
    theirs.upgrade("eo0002")
    with pytest.raises(SchemaOutOfDate, match="Run: alembic upgrade heads"):
        migrating.check(empty)
    with pytest.raises(ConfigurationError, match=r"versions are in public\.alembic_version.*alembic upgrade heads"):
        migrating.upgrade(empty)
    theirs.upgrade()
    assert migrating.upgrade(empty) == migrating.head(), "at head there is nothing to do, so nothing to refuse"
    with pytest.raises(ConfigurationError, match="downgrade eoframework@"):
        migrating.downgrade(empty, "base")


def test_tables_that_eo_db_made_are_joined_later(theirs: Theirs, empty: Database) -> None:
    """Seen to fail without the check in joined.entering: "relation already exists", and no remedy."""
    migrating.upgrade(empty, "eo0002")
    with pytest.raises(ConfigurationError, match=r"is at version eo0002.*alembic stamp eo0002"):
        theirs.upgrade()
    command.stamp(theirs.config(), "eo0002")
    theirs.upgrade()
    assert migrating.check(empty) == migrating.head()
    with pytest.raises(ConfigurationError, match="alembic upgrade heads"):
        migrating.downgrade(empty, "eo0002")


def test_the_printed_sql_does_the_same(theirs: Theirs, empty: Database, empty_url: str) -> None:
    config = theirs.config()
    command.upgrade(config, "heads", sql=True)
    assert isinstance(config.output_buffer, io.StringIO)
    engine = create_engine(empty_url)
    raw = engine.raw_connection()
    raw.cursor().execute(config.output_buffer.getvalue())
    raw.close()
    engine.dispose()
    assert migrating.check(empty) == migrating.head()
    with pytest.raises(ConfigurationError, match=r"public\.alembic_version"):
        migrating.downgrade(empty, "base")


def test_a_role_that_is_called_like_our_schema(
    tmp_path: Path, empty: Database, empty_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its search_path ("$user", public by default) begins with our schema. Seen to fail with our copy of the version in
    a table called alembic_version: alembic took it for its own half-way.
    """
    monkeypatch.chdir(tmp_path)
    theirs = Theirs(tmp_path, f"{empty_url}?options=-csearch_path%3Deo,public", str(migrating.location() / "versions"))
    theirs.upgrade("eo0001")
    theirs.upgrade()
    assert migrating.check(empty) == migrating.head()
    theirs.autogenerate("base")
    theirs.upgrade()
    assert "drop_" not in theirs.autogenerate()
    assert migrating.check(empty) == migrating.head()
    command.downgrade(theirs.config(), "eoframework@base")
    assert migrating.current(empty) is None


@pytest.mark.parametrize("schema", ["public", "Theirs"])
def test_a_search_path_that_has_our_schema_behind_theirs(
    tmp_path: Path, empty: Database, empty_url: str, monkeypatch: pytest.MonkeyPatch, schema: str
) -> None:
    """Seen to fail (autogenerate drops our tables) without the question for the schema in `include_object`; a table of
    theirs that is called like one of ours, and that they have given up, is dropped all the same. Their schema may
    have a name that ours may not.
    """
    monkeypatch.chdir(tmp_path)
    with empty.begin("test") as connection:
        connection.execute(text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
    url = f"{empty_url}?options=-csearch_path%3D%22{schema}%22,eo"
    theirs = Theirs(tmp_path, url, str(migrating.location() / "versions"))
    theirs.upgrade()
    theirs.autogenerate("base")
    theirs.upgrade()
    assert "drop_" not in theirs.autogenerate()
    theirs.upgrade()
    with empty.begin("test") as connection:
        connection.execute(text(f'CREATE TABLE "{schema}".audit (id int)'))
    assert "drop_table('audit')" in theirs.autogenerate()


def test_rights_on_the_version_of_a_joined_chain(theirs: Theirs, empty: Database) -> None:
    theirs.upgrade()
    readiness.check_rights(empty)
    asked = grants.Roles(relay="r")
    assert "joined_version" in grants.script(empty.schema, asked, joined=True)
    assert "joined_version" not in grants.script(empty.schema, asked)
