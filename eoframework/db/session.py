"""A database as eoframework uses it: an engine, our schema, and short transactions with classified errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, create_engine
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


def open_database(url: str, schema: Schema) -> Database:
    """A database with a small pool; opens no connection yet."""
    engine = create_engine(url, pool_pre_ping=True, pool_size=5, max_overflow=10)
    return Database(engine, schema)
