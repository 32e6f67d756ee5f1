"""A database as eoframework uses it: an engine, our schema, and short transactions with classified errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, create_engine, make_url
from sqlalchemy.orm import Session, sessionmaker

from eoframework.db.faults import classified
from eoframework.db.links import check_confirmed, connected, watch
from eoframework.errors import ConfigurationError
from eoframework.schema import Schema

__all__ = ["Connection", "Database", "SessionFactory", "open_database"]

SessionFactory = sessionmaker[Session]

# What an operator or a call beside the batch locks, batches wait for. idle_in_transaction: a process stopped between
# two statements (Ctrl-Z, a laptop that sleeps) would hold them for as long as it is stopped, and it is below the
# lock_timeout of the workers, so that they wait and do not fail. Durable, whatever the database's default: a change
# that a crash of the server takes back has been reported as done.
_BRIEF = """
SELECT set_config('statement_timeout', %(statement)s, true), set_config('lock_timeout', %(lock)s, true),
    set_config('idle_in_transaction_session_timeout', '4s', true), set_config('synchronous_commit',
        CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') THEN 'on'
             ELSE current_setting('synchronous_commit') END, true)
"""


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
        with classified(what), connected(self.engine) as connection:
            with connection.begin():
                yield connection
            check_confirmed(connection, what)

    @contextmanager
    def brief(self, what: str, *, lock_wait: float = 5) -> Iterator[Connection]:
        """A durable transaction that holds no lock for long, whatever happens to this process; READ COMMITTED.

        On a crash: nothing of it happened, unless its COMMIT did. Raises Conflict when a lock is not to be had within
        `lock_wait` seconds, LostConnection when the process was stopped in the middle; either way it was rolled back.
        """
        timeouts = {"lock": f"{lock_wait:.0f}s", "statement": f"{lock_wait + 5:.0f}s"}
        # Under another isolation level than this, what is read after a lock was waited for is from before it.
        with classified(what), connected(self.engine) as connection:
            connection.execution_options(isolation_level="READ COMMITTED")
            with connection.begin():
                connection.exec_driver_sql(_BRIEF, timeouts)
                yield connection
            check_confirmed(connection, what)


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
    watch(engine)
    return Database(engine, schema)
