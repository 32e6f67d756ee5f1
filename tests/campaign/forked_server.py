"""A PostgreSQL of the campaign's own, and a migrated database in it for each lane."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, make_url, text

from eoframework.db import migrating
from eoframework.db.session import open_database
from eoframework.dev import open_home, postgres_programs
from eoframework.dev.postgres import USER, PostgresOptions, PostgresServer
from eoframework.dev.state import PostgresState
from eoframework.schema import Schema
from tests.campaign.forked_world import TABLES

# Only clients are killed here, never the server: what it has committed is in its memory whether it is on the disk or
# not. Everything else is as in production; sessions ask for synchronous_commit themselves.
NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}


@dataclass(frozen=True)
class _Nothing:
    """The server's state is not kept: it ends with this process."""

    def __call__(self) -> None:
        return None


@contextmanager
def own_server(directory: Path) -> Iterator[str]:
    """A server for the length of the block; yields its URL."""
    user = postgres_programs.unprivileged_user()
    with tempfile.TemporaryDirectory(prefix="eo-forked-") as home:
        Path(home).chmod(0o755)
        server = PostgresServer(
            Path(home) / "postgres",
            directory / "postgres.log",
            PostgresState(home=home),
            PostgresOptions(settings=NOT_DURABLE),
            programs=lambda: postgres_programs.reachable(postgres_programs.find(), user, open_home.PROGRAMS),
            user=user,
            changed=_Nothing(),
        )
        server.start()
        try:
            _shorten_the_handshake(server.database_url, Path(home) / "postgres" / "data")
            yield server.database_url
        finally:
            server.stop(mode="immediate")


def _shorten_the_handshake(url: str, data: Path) -> None:
    """The 4,096 rounds of SCRAM are a third of what a process costs that is killed at its first event."""
    hba = data / "pg_hba.conf"
    hba.write_text(hba.read_text().replace("scram-sha-256", "md5"))
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("SET password_encryption = 'md5'"))
        connection.execute(text(f"ALTER ROLE {USER} PASSWORD '{make_url(url).password}'"))
        connection.execute(text("SELECT pg_reload_conf()"))
    engine.dispose()


def lane_database(url: str, name: str) -> str:
    """The URL of a fresh migrated database with the campaign's tables."""
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    admin.dispose()
    own = make_url(url).set(database=name).render_as_string(hide_password=False)
    prepare(own, migrate=True)
    return own


def prepare(url: str, *, migrate: bool = False) -> None:
    """The campaign's tables, in a database that is migrated or is to be."""
    database = open_database(url, Schema())
    if migrate:
        migrating.upgrade(database)
    with database.engine.begin() as connection:
        connection.execute(text(TABLES))
    database.engine.dispose()
