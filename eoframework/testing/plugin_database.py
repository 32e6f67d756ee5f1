"""The databases of a session's tests: one is prepared, each test gets a copy of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

from sqlalchemy import Engine, MetaData

from eoframework import dev
from eoframework.db.scratch import Scratch
from eoframework.settings import Settings

Tables = MetaData | Callable[[Engine], object] | None
"""How the application's own tables are made."""

# Nothing here has to outlive the server.
_HASTY = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}


class TestDatabases:
    """A server, and a template on it with all tables; as a context manager both are gone at the end, however it ends.

    On a crash: a server of our own ends with this process; on the server of EO_DATABASE_URL databases may be left whose
    names begin with eo_test_.
    """

    __test__ = False  # pytest collects classes of this name

    def __init__(self, tables: Tables = None, *, url: str | None = None) -> None:
        """Starts nothing yet. url: of the server, default the settings'."""
        self._tables = tables
        self._stack = ExitStack()
        settings = Settings.load()
        self.schema = settings.database_schema
        self._given = url or (settings.database_url.get_secret_value() if settings.database_url is not None else None)

    def __enter__(self) -> TestDatabases:
        with self._stack:
            self._scratch = Scratch(self._given or self._start(), schema=self.schema)
            self._template = self._scratch.create()
            self._stack.callback(self._scratch.drop, self._template)
            self._scratch.migrate(self._template)
            self._make_tables()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """The URL of a copy, gone at the end of the block."""
        url = self._scratch.create(template=self._template)
        try:
            yield url
        finally:
            self._scratch.drop(url)

    def _start(self) -> str:
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="eo-pytest-")))
        services = dev.find(directory / ".eo", postgres=dev.PostgresOptions(settings=_HASTY))
        self._stack.callback(dev.reset, directory / ".eo")
        services.postgres.start()
        self._stack.callback(services.postgres.stop, mode="immediate")
        return services.database_url

    def _make_tables(self) -> None:
        with self._scratch.opened(self._template) as database:
            if isinstance(self._tables, MetaData):
                self._tables.create_all(database.engine)
            elif self._tables is not None:
                self._tables(database.engine)
