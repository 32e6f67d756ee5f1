"""Where the application under test is run: services of its own, and for each run a fresh database and fresh topics."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from eoframework import clock, dev
from eoframework.checkpoint import checkpoint_topic
from eoframework.crashtest.user_nursery import Nursery
from eoframework.db import contents
from eoframework.db.scratch import Scratch
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, Retryable
from eoframework.kafka.admin import Admin
from eoframework.kafka.scratch import delete_topics
from eoframework.settings import Settings, environment

PREFIX = "eo|%a|%d|%c|%v|"
"""Of each line of the server's log: application_name, database, session, transaction."""
OURS = "eo crashtest"
"""The application_name of our own connections, to tell what the application does from what we do."""

# A killed worker is missed after so long: each run waits for that.
_SESSION_MS = 3_000
_POSTGRES = {
    # No test crashes this server, so nothing has to reach its disk.
    "fsync": "off",
    "full_page_writes": "off",
    "log_statement": "mod",
    "log_line_prefix": PREFIX,
    "log_parameter_max_length": "0",
}
# This broker is not killed: on a busy machine it must not be given up for a late heartbeat.
_KAFKA = {"broker.session.timeout.ms": "18000"}
_FOREIGN = ("EO_KAFKA_SASL", "EO_KAFKA_SSL", "EO_KAFKA_SECURITY", "EO_CRASH", "EO_FREEZE")
_GROUP_SECONDS = 30.0


@dataclass(frozen=True)
class Scene:
    """What one run has to itself."""

    url: str
    database: Database
    settings: Settings
    admin: Admin
    topics: Mapping[str, int]
    shards: int
    environment: Mapping[str, str]

    @property
    def name(self) -> str:
        """The database's name, as it stands in the server's log."""
        return str(self.database.engine.url.database)


def surroundings(names: Sequence[str], url: str, servers: str, *, path: str) -> dict[str, str]:
    """The environment of a process of the application. names: of the variables that hold the database's URL.

    path: its PYTHONPATH, if it is to have one of ours.
    """
    mine = dict.fromkeys(names, url) | {
        "EO_KAFKA_BOOTSTRAP_SERVERS": servers,
        # A .env file, or pyproject.toml, may say how the real cluster is reached.
        "EO_KAFKA_SECURITY_PROTOCOL": "PLAINTEXT",
        "PGAPPNAME": "the application",
    }
    if path:
        mine["PYTHONPATH"] = path
    # How the real cluster is reached says nothing about this one.
    kept = {name: value for name, value in environment().items() if not name.startswith(_FOREIGN)}
    return {**kept, **mine}


def command_of(text: str) -> list[str]:
    """The words of `--migrate`. Raises ConfigurationError when there is no such program."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigurationError(f"--migrate {text!r}: {error}.", remedy="Write it as for a shell.") from error
    if not words or shutil.which(words[0]) is None:
        raise ConfigurationError(
            f"--migrate {text!r}: there is no program {(words or [''])[0]!r}.",
            remedy="It is no shell's line; for one, write: sh -c '...'.",
        )
    return words


class Stage:
    """Services, for one crash test after the other; as a context manager everything is gone at the end.

    On a crash: the services end with this process; the directory is left.
    """

    template: str
    """The URL of the database that each run gets a copy of; there since `begin`."""

    def __init__(self, *, path: str = "") -> None:
        """path: PYTHONPATH of the app's processes."""
        self._variables: tuple[str, ...] = ()
        self._path = path
        self._stack = ExitStack()

    def __enter__(self) -> Stage:
        with self._stack:
            self.directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="eo-crashtest-")))
            state = self.directory / ".eo"
            options = dev.KafkaOptions(brokers=1, session_timeout_ms=_SESSION_MS, properties=_KAFKA)
            self._stack.callback(dev.reset, state)
            self._services = self._stack.enter_context(
                dev.start(state, kafka=options, postgres=dev.PostgresOptions(settings=_POSTGRES))
            )
            self._schema = Settings.load().database_schema
            self._scratch = Scratch(self._services.database_url, schema=self._schema)
            # Its processes are gone before the services are.
            self.nursery = self._stack.enter_context(Nursery(self.variables(self._services.database_url)))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def begin(self, variables: Sequence[str], *, migrate: str = "") -> None:
        """A template with our tables. variables: others than EO_DATABASE_URL that hold the database's URL.

        migrate: the application's own command, which comes first: it may make our tables too, in its own alembic
        chain. Raises ConfigurationError with what it said.
        """
        self._variables = tuple(variables)
        self.template = self._scratch.create()
        if migrate:
            self._migrate(migrate)
        self._scratch.migrate(self.template)

    @property
    def server_log(self) -> Path:
        """PostgreSQL's."""
        return self._services.postgres.log

    def variables(self, url: str, **more: str) -> dict[str, str]:
        """The environment of a process of the application that works on this database."""
        names = ("EO_DATABASE_URL", *self._variables)
        return {**surroundings(names, url, self._services.bootstrap_servers, path=self._path), **more}

    def _migrate(self, command: str) -> None:
        done = subprocess.run(
            command_of(command),
            env=self.variables(self.template),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ConfigurationError(
                f"--migrate {command!r} ended with {done.returncode}:\n{(done.stderr or done.stdout)[-2000:].rstrip()}",
                remedy="\nIt runs where you are, on an empty database that EO_DATABASE_URL names.",
            )

    def has_tables(self) -> bool:
        """Whether the template has any table but ours."""
        with self._scratch.opened(self.template) as database, database.begin("looking for tables") as connection:
            return bool(contents.read(connection, database.schema))

    @contextmanager
    def scene(self, topics: Mapping[str, int], groups: Sequence[str]) -> Iterator[Scene]:
        """A copy of the template, and these topics (name -> partitions), empty; gone at the end."""
        url = self._scratch.create(template=self.template)
        try:
            with self._scratch.opened(f"{url}?application_name={OURS.replace(' ', '%20')}") as database:
                settings = Settings.load(
                    database_url=url, kafka_bootstrap_servers=self._services.bootstrap_servers
                ).model_copy(update={"kafka": {}})
                admin = Admin(settings)
                with database.begin("asking for the outbox") as connection:
                    outbox, shards = contents.outbox_of(connection, database.schema)
                self._empty(admin, settings, topics, groups)
                admin.create(
                    checkpoint_topic(outbox), partitions=shards, replicas=1, config={"cleanup.policy": "compact"}
                )
                yield Scene(url, database, settings, admin, topics, shards, self.variables(url))
                delete_topics(settings, [checkpoint_topic(outbox)])
        finally:
            self._scratch.drop(url)

    def _empty(self, admin: Admin, settings: Settings, topics: Mapping[str, int], groups: Sequence[str]) -> None:
        delete_topics(settings, topics.keys())
        for group in groups:
            _forget(admin, group)
        for name, partitions in topics.items():
            admin.create(name, partitions=partitions, replicas=1, config={})


def _forget(admin: Admin, group: str) -> None:
    """Delete a group of the last run: its offsets are of topics that are gone."""
    deadline = clock.monotonic() + _GROUP_SECONDS
    while True:
        try:
            if admin.delete_group(group):
                return
            trouble = Retryable(f"group {group} of the last run still has members.")
        except Retryable as error:  # a broker that has just started does not know its groups yet
            trouble = error
        # A killed worker is a member until it is missed.
        if clock.monotonic() > deadline:
            raise trouble
        clock.sleep(0.1)
