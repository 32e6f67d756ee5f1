"""The development database: a PostgreSQL server on this machine's loopback, durable as in production."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eoframework import clock
from eoframework.db.probe import ensure_database, select_one
from eoframework.dev import jars, logs, processes
from eoframework.dev.postgres_programs import Programs, SystemUser
from eoframework.dev.processes import CalledOff, Guarded, Identity, Plan
from eoframework.dev.state import PostgresState
from eoframework.errors import ConfigurationError, Unreachable

USER = DATABASE = "eo"
StopMode = Literal["fast", "immediate", "kill"]

BEHAVIOUR = {
    "max_connections": "200",
    # The role is called like our schema, and "$user" comes first by default: once `eo db upgrade` has run, the tables
    # of whoever develops would land among ours, out of sight of roles of another name.
    "search_path": "public",
}
"""How the server behaves, wherever it runs."""

_START_SECONDS = 60.0
_SOCKET_PATH_LIMIT = 100
_SIGNALS: Mapping[StopMode, signal.Signals] = {
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
    "kill": signal.SIGKILL,
}


@dataclass(frozen=True, kw_only=True)
class PostgresOptions:
    """How the server runs. `settings` are added to ours and win over them."""

    port: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    programs: Programs | None = None
    """The PostgreSQL to use; None: the one on PATH, else the wheel's."""


class PostgresServer:
    """One server with its data; every change of its process is told to `changed`, which remembers it."""

    def __init__(
        self,
        home: Path,
        log: Path,
        state: PostgresState,
        options: PostgresOptions,
        *,
        programs: Callable[[], Programs],
        user: SystemUser | None,
        changed: Callable[[], None],
    ) -> None:
        self.log = log
        self._home = home
        self._state = state
        self._options = options
        self._programs = programs
        self._user = user
        self._changed = changed
        self._guarded: Guarded | None = None

    @property
    def port(self) -> int:
        """The TCP port; it stays the same over restarts."""
        assert self._state.port is not None
        return self._state.port

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL, password included."""
        return f"postgresql+psycopg://{USER}:{self._state.password}@127.0.0.1:{self.port}/{DATABASE}"

    @property
    def identity(self) -> Identity | None:
        """The server's process; None when it was stopped on purpose or never started."""
        return self._state.process

    def running(self) -> bool:
        """Its process lives and its port answers."""
        process = self._state.process
        return process is not None and process.alive() and processes.answers(self.port)

    def choose_port(self) -> None:
        """Fix the port: pinned, else that of last time while free, else a free one."""
        self._state.port = processes.choose_port(
            wanted=self._options.port, remembered=self._state.port, option="--postgres-port", what="PostgreSQL"
        )

    def start(self, *, stop: threading.Event | None = None) -> None:
        """Start the server on its data and wait until `select 1` answers in the database `eo`.

        Raises ConfigurationError or Unreachable with the decisive line of the log when it dies, and leaves no process.
        """
        stop = stop or threading.Event()
        if self._state.port is None:
            self.choose_port()
        programs = self._programs()
        self._initialise(programs)
        logs.mark(self.log)
        self._guarded = processes.spawn(self._plan(self._server_command(programs), grace=8.0))
        self._state.process = self._guarded.identity
        self._changed()
        try:
            self._wait_until_ready(self._guarded, stop)
        except BaseException:
            self.stop(mode="immediate")
            raise

    def keep(self) -> None:
        """Let the server outlive this process."""
        if self._guarded is not None:
            self._guarded.keep()
            self._guarded = None

    def stop(self, *, mode: StopMode = "fast") -> None:
        """Stop the server: `fast` rolls back what is open, `immediate` and `kill` leave recovery to the next start.

        Data and port stay; `start()` goes on with them.
        """
        if self._state.process is not None:
            processes.end(self._state.process, stop_signal=_SIGNALS[mode], grace=15.0)
        if self._guarded is not None:
            self._guarded.end()
            self._guarded = None
        self._state.process = None
        self._changed()

    def pause(self) -> None:
        """SIGSTOP the postmaster: open connections work on, new ones hang."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after `pause()`."""
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        process = self._state.process
        if process is None or not processes.send(process, number):
            raise Unreachable("The development database does not run.", remedy="Call start() first, or `eo dev up`.")

    @property
    def _data(self) -> Path:
        return self._home / "data"

    def _initialise(self, programs: Programs) -> None:
        made_by = self._state.initialised
        if made_by and made_by != str(programs.version):
            raise ConfigurationError(
                f"The data in {self._data} are PostgreSQL {made_by}'s, the server found is {programs.version}.",
                remedy=f"Put PostgreSQL {made_by} on PATH again, or run `eo dev reset` to begin with empty data.",
            )
        if made_by:
            return
        # Whatever an interrupted initdb left is no data of anybody's.
        shutil.rmtree(self._data, ignore_errors=True)
        self._state.password = secrets.token_urlsafe(18)
        password_file = self._home / "password"
        logs.mark(self.log)
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            self._give_to_user(self._home)
            _write_secret(password_file, self._state.password)
            self._give_to_user(password_file)
            code = processes.run(self._plan(self._initdb_command(programs, password_file), grace=2.0))
        except OSError as error:
            raise jars.disk_error(error, self._home) from error
        finally:
            password_file.unlink(missing_ok=True)
        if code != 0:
            raise logs.died("PostgreSQL's initdb", self.log, code)
        self._state.initialised = str(programs.version)
        self._changed()

    def _initdb_command(self, programs: Programs, password_file: Path) -> list[str]:
        return [
            str(programs.directory / "initdb"),
            f"--pgdata={self._data}",
            f"--username={USER}",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
        ]

    def _server_command(self, programs: Programs) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": self._socket_directory(),
            **BEHAVIOUR,
            # Written out, because everything we promise rests on them.
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
            **self._options.settings,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(programs.directory / "postgres"), "-D", str(self._data), *options]

    def _socket_directory(self) -> str:
        # The address of a unix socket is at most 107 bytes; PostgreSQL does not start with a longer one.
        socket = self._home / f".s.PGSQL.{self.port}"
        return str(self._home) if len(os.fsencode(socket)) <= _SOCKET_PATH_LIMIT else ""

    def _plan(self, command: list[str], *, grace: float) -> Plan:
        return Plan(
            command=command,
            log=self.log,
            directory=self._home,
            uid=self._user.uid if self._user else None,
            gid=self._user.gid if self._user else None,
            # LC_ALL: the log is read for its decisive line.
            environment={"LC_ALL": "C"},
            # SIGTERM would wait for every client to leave.
            stop_signal=signal.SIGINT,
            grace=grace,
        )

    def _give_to_user(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user.uid, self._user.gid)

    def _wait_until_ready(self, guarded: Guarded, stop: threading.Event) -> None:
        conninfo = f"host=127.0.0.1 port={self.port} user={USER} password={self._state.password}"
        deadline = clock.monotonic() + _START_SECONDS
        last: Unreachable | None = None
        while clock.monotonic() < deadline:
            if stop.is_set():
                raise CalledOff("The start of PostgreSQL was called off.")
            if guarded.exit_code() is not None:
                raise logs.died("PostgreSQL", self.log, guarded.exit_code())
            try:
                ensure_database(f"{conninfo} dbname=postgres", DATABASE)
                select_one(f"{conninfo} dbname={DATABASE}")
            except Unreachable as error:
                last = error
                clock.wait(stop, 0.05)
            else:
                return
        raise Unreachable(
            f"PostgreSQL was not ready within {_START_SECONDS:.0f} s: {last}", remedy=f"Its log is {self.log}."
        )


def _write_secret(path: Path, content: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(content)
