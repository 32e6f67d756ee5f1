"""A primary with standbys that stream from it, killed and promoted as a failover manager would do it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import URL, make_url

from eoframework.dev import processes
from eoframework.dev.postgres_programs import Programs, SystemUser
from eoframework.dev.state import PostgresState
from tests.postgres.servers import Server, open_directory
from tests.processes import eventually
from tests.proxy import Proxy

_NAMES = ("a", "b", "c")
_RECEIVED = "SELECT greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) - '0/0'::pg_lsn"
_LOOKS = 5


class Replicas:
    """Servers a, b, c: one is the primary, the others follow whoever is; `url` names them all."""

    def __init__(self, directory: Path, programs: Programs, *, synchronous: bool, count: int) -> None:
        self._synchronous = synchronous
        ports: list[int] = []
        for _ in range(count):
            ports.append(processes.free_port(avoid=ports))
        self._settings = {"hot_standby": "on", "wal_keep_size": "256MB", "fsync": "off", "full_page_writes": "off"}
        first = Server(directory / "a", programs, self._settings, state=PostgresState(port=ports[0]))
        first.start()
        first.stop()
        self.servers = {"a": first}
        self.primary = "a"
        # Synchronous ones must follow whatever happens; of the others some is to get lost.
        self._proxy = None if synchronous else Proxy("127.0.0.1", ports[0])
        self._first_port = self._proxy.port if self._proxy else ports[0]
        for name, port in zip(_NAMES[1:], ports[1:], strict=False):
            state = PostgresState(port=port, password=first._state.password, initialised=first._state.initialised)
            self.servers[name] = Server(directory / name, programs, self._settings, state=state)
            _copy(first.home, directory / name, first.user)
            self._follow(name)
        for server in self.servers.values():
            server.start()
        eventually(lambda: len(self.followers()) == count - 1, "standbys that stream", seconds=30)
        self._ask_for_standbys()

    @property
    def url(self) -> str:
        """All of them, and whichever takes writes is meant."""
        url = make_url(self.servers["a"].database_url)
        hosts = [f"127.0.0.1:{server.port}" for server in self.servers.values()]
        query = {"host": hosts, "target_session_attrs": "read-write"}
        whole = URL.create(url.drivername, url.username, url.password, database=url.database, query=query)
        return whole.render_as_string(hide_password=False)

    def ask(self, name: str, statement: str) -> list[tuple[object, ...]]:
        """One statement on this server, past everything."""
        url = make_url(self.servers[name].database_url).set(drivername="postgresql")
        with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
            answer = connection.execute(statement.encode())
            return answer.fetchall() if answer.description else []

    def followers(self) -> list[object]:
        """Who streams from the primary."""
        return [
            row[0] for row in self.ask(self.primary, "SELECT pid FROM pg_stat_replication WHERE state = 'streaming'")
        ]

    def caught_up(self) -> bool:
        """Whether every follower has all that the primary has written."""
        behind = "SELECT count(*) FROM pg_stat_replication WHERE flush_lsn IS DISTINCT FROM pg_current_wal_lsn()"
        return self.ask(self.primary, behind) == [(0,)]

    def cut(self) -> None:
        """From now on no follower gets anything of what `a` writes."""
        assert self._proxy is not None, "synchronous ones are not cut off"
        self._proxy.close()
        eventually(lambda: not self.followers(), "nobody streams")

    @contextmanager
    def deaf(self, name: str) -> Iterator[None]:
        """This standby takes nothing in, although it is there (SIGSTOP of its receiver).

        If the primary dies meanwhile it never gets what was on its way: that would still be in its receiver's socket.
        """
        ((found,),) = self.ask(name, "SELECT pid FROM pg_stat_wal_receiver")
        receiver = int(str(found))
        os.kill(receiver, signal.SIGSTOP)
        try:
            yield
        finally:
            gone = not self.servers[self.primary].running()
            os.kill(receiver, signal.SIGKILL if gone else signal.SIGCONT)
            if gone:
                # Its server restarts by itself, as after any crash of one of its processes.
                eventually(lambda: not processes.start_time(receiver), "the receiver is dead")
                eventually(lambda: self._answers(name), "its server is back", seconds=30)

    def kill_primary(self) -> None:
        """kill -9 of its postmaster; its other processes end when they notice."""
        if self._proxy is not None:
            self._proxy.close()
        self.servers[self.primary].stop(mode="kill")

    def promote(self) -> str:
        """Promote the standby that has most, and name who follows it from now on: all that a failover manager does."""
        left = [name for name, server in self.servers.items() if name != self.primary and server.running()]
        eventually(lambda: not any(self.ask(n, "SELECT FROM pg_stat_wal_receiver") for n in left), "receivers end")
        self.primary = max(left, key=self._received)
        self.ask(self.primary, "SELECT pg_promote(true, 60)")
        others = len(left) - 1
        if others:
            eventually(lambda: len(self.followers()) == others, "the others follow", seconds=30)
        self._ask_for_standbys()
        return self.primary

    def stop(self) -> None:
        for server in self.servers.values():
            server.stop(mode="immediate")
        if self._proxy is not None:
            self._proxy.close()

    def _answers(self, name: str) -> bool:
        try:
            return self.ask(name, "SELECT count(*) FROM pg_stat_wal_receiver") == [(0,)]
        except psycopg.OperationalError:
            return False

    def _received(self, name: str) -> int:
        """How much it has of what the primary wrote, once it has looked through all of that (it may have restarted)."""
        seen: list[int] = []

        def settled() -> bool:
            ((found,),) = self.ask(name, _RECEIVED)
            seen.append(int(str(found)))
            return len(seen) > _LOOKS and len(set(seen[-_LOOKS:])) == 1

        eventually(settled, "nothing more to replay", seconds=30)
        return seen[-1]

    def _ask_for_standbys(self) -> None:
        names = "ANY 1 (*)" if self._synchronous and self.followers() else ""
        self.ask(self.primary, f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        self.ask(self.primary, "SELECT pg_reload_conf()")

    def _follow(self, name: str) -> None:
        """Stream from `a`, or from whoever is promoted."""
        server = self.servers[name]
        others = [self._first_port, *(s.port for n, s in self.servers.items() if n not in ("a", name))]
        # The later ones are not known to the earlier ones yet: each is told of all when it is there.
        for earlier in self.servers.keys() - {"a", name}:
            self._configure(earlier, [self._first_port, server.port])
        self._configure(name, others)
        (server.home / "data" / "standby.signal").touch()
        _give(server.home / "data" / "standby.signal", server.user)

    def _configure(self, name: str, ports: Sequence[int]) -> None:
        server = self.servers[name]
        conninfo = (
            f"host={','.join(['127.0.0.1'] * len(ports))} port={','.join(map(str, ports))} "
            f"user=eo password={server._state.password} application_name={name} target_session_attrs=read-write"
        )
        file = server.home / "data" / "postgresql.auto.conf"
        file.write_text(f"primary_conninfo = '{conninfo}'\nwal_retrieve_retry_interval = '200ms'\n")
        _give(file, server.user)


def _copy(source: Path, target: Path, user: SystemUser | None) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("postmaster.pid"))
    for path in (target, *target.rglob("*")):
        _give(path, user)


def _give(path: Path, user: SystemUser | None) -> None:
    if user is not None:
        os.chown(path, user.uid, user.gid)


@contextmanager
def replicas(programs: Programs, *, synchronous: bool, count: int = 2) -> Iterator[Replicas]:
    """Running servers, gone at the end."""
    with open_directory() as directory:
        running = Replicas(directory, programs, synchronous=synchronous, count=count)
        try:
            yield running
        finally:
            running.stop()
