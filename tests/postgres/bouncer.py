"""PgBouncer before a server, in transaction mode: each transaction runs in the next of the server's sessions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import URL, make_url

from eoframework.dev import postgres_programs, processes
from eoframework.dev.processes import Guarded, Plan
from eoframework.errors import ConfigurationError
from tests.postgres.servers import open_directory
from tests.processes import eventually

_SETTINGS = {
    "listen_addr": "127.0.0.1",
    "unix_socket_dir": "",
    "auth_type": "scram-sha-256",
    "auth_file": "users.txt",
    "pool_mode": "transaction",
    "max_client_conn": "500",
    "default_pool_size": "6",
    # The session that waited longest, not the last one used: what needs the same one twice fails at once.
    "server_round_robin": "1",
    # A server that is down for a moment would be refused for 15 s.
    "server_login_retry": "1",
}


def program() -> str:
    """Its path. Raises ConfigurationError with the command that installs it: a test that needs it fails by this."""
    found = shutil.which("pgbouncer", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin")))
    if found is None:
        raise ConfigurationError(
            "PgBouncer is not installed: what is promised behind it cannot be tested.",
            remedy="apt-get install -y --no-install-recommends pgbouncer (on macOS: brew install pgbouncer)",
        )
    return found


class Bouncer:
    """One PgBouncer in front of one server; `url` leads through it, `direct` past it."""

    def __init__(self, directory: Path, direct_url: str, *, upstream: int | None = None, **settings: str) -> None:
        """`upstream`: the port of the server as the bouncer sees it (a proxy's); default that of the URL."""
        self.direct: URL = make_url(direct_url)
        self.port = processes.free_port()
        self.log = directory / "pgbouncer.log"
        self._directory = directory
        self._upstream = upstream or self.direct.port or 5432
        self._user = postgres_programs.unprivileged_user()
        self._guarded: Guarded | None = None
        self._settings = {**_SETTINGS, "listen_port": str(self.port), **settings}

    @property
    def url(self) -> str:
        """The URL through the bouncer, of the same database."""
        return self.through(self.direct)

    def through(self, url: URL | str) -> str:
        """The same URL, led through the bouncer."""
        return make_url(url).set(host="127.0.0.1", port=self.port).render_as_string(hide_password=False)

    def start(self) -> None:
        """Start it and wait until it answers."""
        self._write()
        uid, gid = (self._user.uid, self._user.gid) if self._user else (None, None)
        command = [program(), "--quiet", "pgbouncer.ini"]
        self._guarded = processes.spawn(
            Plan(command=command, log=self.log, uid=uid, gid=gid, directory=self._directory)
        )
        eventually(lambda: processes.answers(self.port), "PgBouncer answers", seconds=10, log=self.log)

    def kill(self) -> None:
        """SIGKILL: every conversation through it is cut, wherever it was."""
        assert self._guarded is not None
        os.kill(self._guarded.identity.pid, 9)
        self.stop()

    def stop(self) -> None:
        guarded, self._guarded = self._guarded, None
        if guarded is not None:
            guarded.end()

    def ask(self, command: str) -> list[tuple[object, ...]]:
        """A command to its own console, such as SHOW POOLS."""
        url = make_url(self.url).set(drivername="postgresql", database="pgbouncer")
        with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as console:
            # It knows no extended protocol.
            answer = psycopg.ClientCursor(console).execute(command.encode())
            return answer.fetchall() if answer.description else []

    def _write(self) -> None:
        users = self._directory / "users.txt"
        settings = {**self._settings, "admin_users": str(self.direct.username)}
        lines = "\n".join(f"{name} = {value}" for name, value in settings.items())
        (self._directory / "pgbouncer.ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={self._upstream}\n\n[pgbouncer]\n{lines}\n"
        )
        users.write_text(f'"{self.direct.username}" "{self.direct.password}"\n')
        if self._user is not None:
            for path in (self._directory, users):
                os.chown(path, self._user.uid, self._user.gid)
        users.chmod(0o600)


@contextmanager
def bouncer_before(direct_url: str, *, upstream: int | None = None, **settings: str) -> Iterator[Bouncer]:
    """A running bouncer, gone at the end."""
    with open_directory() as directory:
        bouncer = Bouncer(directory, direct_url, upstream=upstream, **settings)
        bouncer.start()
        try:
            yield bouncer
        finally:
            bouncer.stop()
