"""A database as eoframework uses it: an engine, our schema, and short transactions with classified errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, create_engine, make_url
from sqlalchemy.orm import Session, sessionmaker

from eoframework.db.faults import classified
from eoframework.errors import ConfigurationError
from eoframework.schema import Schema

__all__ = ["Connection", "Database", "SessionFactory", "open_database"]

SessionFactory = sessionmaker[Session]


@dataclass(frozen=True)
class Database:
    """An engine and the schema of our tables in it."""

    engine: Engine
    schema: Schema

    def __post_init__(self) -> None:
        if self.engine.dialect.name != "postgresql" or self.engine.dialect.driver not in {"psycopg", "psycopg_async"}:
            raise ConfigurationError(
                f"the engine uses {self.engine.dialect.name}+{self.engine.dialect.driver}.",
                remedy="eoframework needs PostgreSQL through psycopg 3: postgresql+psycopg://...",
            )

    @contextmanager
    def begin(self, what: str) -> Iterator[Connection]:
        """One short transaction; errors leave classified (db/faults.py), `what` names the work in their message."""
        with classified(what), self.engine.begin() as connection:
            yield connection


# A host that vanished (no reset, no answer) would hold a worker for minutes or hours: statement_timeout is the
# server's, and the server is what is gone. Seconds, except the last.
_NETWORK_PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def open_database(url: str, schema: Schema) -> Database:
    """A database with a small pool; opens no connection yet. What the URL itself says of the network counts."""
    asked = make_url(url).query
    patience = {name: value for name, value in _NETWORK_PATIENCE.items() if name not in asked}
    engine = create_engine(url, pool_pre_ping=True, pool_size=5, max_overflow=10, connect_args=patience)
    return Database(engine, schema)
