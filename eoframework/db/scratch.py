"""Databases made for a test and dropped after it: empty, or a copy of one that was prepared once."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, create_engine, exc, make_url, text

from eoframework.db import migrating
from eoframework.db.adopting import adopt
from eoframework.db.faults import sqlstate_of
from eoframework.db.session import Database, open_database
from eoframework.db.throw_away import mark_throw_away
from eoframework.errors import ConfigurationError
from eoframework.schema import Schema

_NOT_ALLOWED = "42501"


class Scratch:
    """Makes databases on one server. The one that the URL names is only connected to, never changed."""

    def __init__(self, url: str, *, schema: str) -> None:
        """schema: of our tables, in each of them. Connects to nothing."""
        self._url = make_url(url)
        self._schema = Schema(schema)

    def create(self, *, template: str | None = None) -> str:
        """A new database, marked as throw-away; returns its URL. On a crash: it may be left, under an eo_test_ name.

        template: the URL of the one to copy, to which nobody is connected; its outbox gets an identity of its own.
        Raises ConfigurationError when the role may not.
        """
        name = f"eo_test_{secrets.token_hex(6)}"
        source = "" if template is None else f' TEMPLATE "{make_url(template).database}"'
        try:
            self._run(f'CREATE DATABASE "{name}"{source}')
        except exc.ProgrammingError as error:
            if sqlstate_of(error) != _NOT_ALLOWED:
                raise
            raise ConfigurationError(
                f"database role {self._url.username!r} may not create databases on {self._url.host}, and each test "
                "needs one of its own.",
                remedy=f'As superuser: ALTER ROLE "{self._url.username}" CREATEDB; or leave EO_DATABASE_URL unset.',
            ) from error
        url = self._url.set(database=name).render_as_string(hide_password=False)
        database = open_database(url, self._schema)
        mark_throw_away(database)
        if template is not None:
            # Otherwise two copies of one template were one outbox, and refused as a copy nobody has declared.
            adopt(database, "copy", actor="eo test")
        database.engine.dispose()
        return url

    def migrate(self, url: str) -> None:
        """Bring our tables there to the version this code needs."""
        with self.opened(url) as database:
            migrating.upgrade(database)

    @contextmanager
    def opened(self, url: str) -> Iterator[Database]:
        """The database, with no connection left at the end: a template must have none."""
        database = open_database(url, self._schema)
        try:
            yield database
        finally:
            database.engine.dispose()

    def drop(self, url: str) -> None:
        """Drop it with whoever is still connected; nothing happens when it is gone."""
        self._run(f'DROP DATABASE IF EXISTS "{make_url(url).database}" WITH (FORCE)')

    def _run(self, statement: str) -> None:
        engine: Engine = create_engine(self._url, isolation_level="AUTOCOMMIT")
        try:
            with engine.connect() as connection:
                connection.execute(text(statement))
        finally:
            engine.dispose()


def location(url: str) -> list[str | int | None]:
    """Host, port and name of the database: two URLs that agree in these are the same one."""
    found = make_url(url)
    return [found.host, found.port, found.database]
