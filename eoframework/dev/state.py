"""What is remembered of the services in their state directory: `state.json`, and the lock of who changes it."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from eoframework.dev.jars import disk_error
from eoframework.dev.processes import Identity, wait_until
from eoframework.errors import ConfigurationError, Unreachable

_VERSION = 2
_ONE_BROKER = 1
"""The version before, whose `kafka` was one broker instead of a list."""
_LOCK_PATIENCE = 180.0


@dataclass(kw_only=True)
class KafkaState:
    """One broker: `process` is None when it was stopped on purpose."""

    node_id: int = 1
    cluster_id: str = ""
    port: int | None = None
    controller_port: int | None = None
    formatted: bool = False
    process: Identity | None = None


@dataclass(kw_only=True)
class PostgresState:
    """The database server; `home` lies elsewhere when its user cannot enter the state directory."""

    password: str = ""
    port: int | None = None
    home: str = ""
    initialised: str = ""
    """Major version of the initdb that made the data; no other one can read them."""
    process: Identity | None = None


@dataclass(kw_only=True)
class State:
    """All services, and the process they live and die with (None: they stay until `eo dev down`)."""

    kafka: list[KafkaState]
    postgres: PostgresState
    owner: Identity | None = None


_S = TypeVar("_S", KafkaState, PostgresState)


class StateDirectory:
    """The directory in which a project's services keep everything they have."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.file = self.path / "state.json"
        self.temporary = self.path / f"state.{os.getpid()}.tmp"

    def prepare(self) -> None:
        """Make the directory; other users may pass through it (PostgreSQL's own one must), not list it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o711)
            (self.path / ".gitignore").write_text("*\n")
        except OSError as error:
            raise disk_error(error, self.path) from error

    def load(self) -> State:
        """What is remembered; a fresh state when nothing is."""
        try:
            content = json.loads(self.file.read_text())
        except FileNotFoundError:
            return State(kafka=[], postgres=PostgresState())
        except ValueError as error:
            raise self._unreadable("it is no JSON") from error
        if not isinstance(content, dict) or content.get("version") not in (_VERSION, _ONE_BROKER):
            raise self._unreadable("it was written by another version of eoframework")
        brokers = [content["kafka"]] if content["version"] == _ONE_BROKER else content["kafka"]
        return State(
            kafka=[_read(KafkaState, broker) for broker in brokers],
            postgres=_read(PostgresState, content["postgres"]),
            owner=_identity(content["owner"]),
        )

    def save(self, state: State) -> None:
        """Remember the state. On a crash: the old file or the new one stands there, whole."""
        document = {"version": _VERSION, **asdict(state)}
        try:
            # 0600 from the first byte: the database's password is in it.
            descriptor = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(document, file, indent=2)
            self.temporary.rename(self.file)
        except OSError as error:
            self.temporary.unlink(missing_ok=True)
            raise disk_error(error, self.path) from error

    @contextmanager
    def locked(self, *, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """One command at a time changes these services; the lock goes with the process, however it ends."""
        with (self.path / "lock").open("w") as file:
            if not _try_lock(file.fileno()):
                if waiting is not None:
                    waiting()
                if not wait_until(lambda: _try_lock(file.fileno()), _LOCK_PATIENCE):
                    raise Unreachable(
                        f"Another `eo dev` command has been at work in {self.path} for {_LOCK_PATIENCE:.0f} s.",
                        remedy="Wait for it or stop it, then run this again.",
                    )
            yield

    def _unreadable(self, why: str) -> ConfigurationError:
        return ConfigurationError(
            f"The state file {self.file} cannot be used: {why}.",
            remedy="Stop its services by hand if they run, and run `eo dev reset` to begin anew.",
        )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(kind: type[_S], content: dict[str, Any]) -> _S:
    known = {field.name for field in fields(kind)}
    values = {name: value for name, value in content.items() if name in known}
    return kind(**{**values, "process": _identity(content.get("process"))})


def _identity(content: dict[str, Any] | None) -> Identity | None:
    return Identity(pid=content["pid"], started=content["started"]) if content else None
