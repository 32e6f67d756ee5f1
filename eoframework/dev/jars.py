"""Kafka's jars: from a checked-in list with sha256, downloaded once per user, verified at every start."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

from eoframework import clock
from eoframework.errors import ConfigurationError, EoError, Unreachable

KAFKA_VERSION = "4.1.1"
LIST = Path(__file__).with_name("kafka-jars.txt")
REPOSITORY_SETTING = "EO_DEV_MAVEN_REPOSITORY"

_ATTEMPTS = 3
_PARALLEL = 8
_CHUNK = 1 << 18

Downloaded = Callable[[int, int], None]
"""Told the bytes downloaded so far and the bytes to download."""


@dataclass(frozen=True, kw_only=True)
class Jar:
    """One line of the pinned list."""

    group: str
    artifact: str
    version: str
    sha256: str
    size: int

    @property
    def file_name(self) -> str:
        """The name in the cache and in the repository."""
        return f"{self.artifact}-{self.version}.jar"

    @property
    def path(self) -> str:
        """The path below a Maven repository's address."""
        return f"{self.group.replace('.', '/')}/{self.artifact}/{self.version}/{self.file_name}"


class Interrupted(Exception):
    """Another download failed or the user stopped: this one ends quietly."""


def pinned(listing: Path = LIST) -> list[Jar]:
    """The jars of the checked-in list: lines of `group:artifact:version sha256 size`, `#` comments."""
    jars = []
    for line in listing.read_text().splitlines():
        if line and not line.startswith("#"):
            coordinates, sha256, size = line.split()
            group, artifact, version = coordinates.split(":")
            jars.append(Jar(group=group, artifact=artifact, version=version, sha256=sha256, size=int(size)))
    return jars


def ensure(directory: Path, *, repository: str | None, downloaded: Downloaded, jars: Sequence[Jar]) -> list[Path]:
    """Every jar stands in `directory` with the pinned content; missing or damaged ones are downloaded.

    On a crash: a jar appears by rename after its sha256 was right, so a half download is never taken for one.
    Raises Unreachable when the repository cannot be read, ConfigurationError when it serves other bytes.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(directory):
            missing = _not_intact(directory, jars)
            if missing:
                _download(directory, missing, repository or default_repository(), downloaded)
    except OSError as error:
        raise disk_error(error, directory) from error
    return [directory / jar.file_name for jar in jars]


def default_repository() -> str:
    """Maven Central's address, as the PyPI package `jgo` knows it."""
    try:
        # By name and late: an extra that only a download needs; an installed product runs without it.
        constants = importlib.import_module("jgo.constants")
    except ImportError as error:
        raise ConfigurationError(
            "Kafka's jars must be downloaded, but the package that knows Maven Central's address is not installed.",
            remedy=f"Run `pip install 'eoframework[dev]'`, or set {REPOSITORY_SETTING} to a Maven repository.",
        ) from error
    return str(constants.MAVEN_CENTRAL_URL)


def disk_error(error: OSError, where: Path) -> EoError:
    """One sentence with the remedy for a file that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigurationError(
            f"The disk of {where} is full.", remedy="Free about 500 MB there, or choose another place (--state-dir)."
        )
    return ConfigurationError(
        f"{error.filename or where} cannot be written: {error.strerror or error}.",
        remedy="Check its owner and permissions, or choose another place (--state-dir, XDG_CACHE_HOME).",
    )


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    # Two projects that start at once on a new machine would otherwise both download everything.
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _not_intact(directory: Path, jars: Sequence[Jar]) -> list[Jar]:
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return [
            jar for jar, good in zip(jars, pool.map(lambda jar: _intact(directory, jar), jars), strict=True) if not good
        ]


def _intact(directory: Path, jar: Jar) -> bool:
    file = directory / jar.file_name
    try:
        if file.stat().st_size != jar.size:
            return False
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == jar.sha256
    except FileNotFoundError:
        return False


def _download(directory: Path, jars: Sequence[Jar], repository: str, downloaded: Downloaded) -> None:
    stop = threading.Event()
    progress = _Progress(sum(jar.size for jar in jars), downloaded)
    pool = ThreadPoolExecutor(_PARALLEL)
    try:
        # The largest first: a 10 MB jar begun last would be waited for alone.
        ordered = sorted(jars, key=lambda jar: -jar.size)
        running = {pool.submit(_fetch, directory, jar, repository, progress, stop) for jar in ordered}
        while running:
            done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            _raise_first(done)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _raise_first(done: set[Future[None]]) -> None:
    for future in done:
        future.result()


class _Progress:
    def __init__(self, total: int, downloaded: Downloaded) -> None:
        self._total, self._sum = total, 0
        self._downloaded = downloaded
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._sum += count
            self._downloaded(self._sum, self._total)


def _fetch(directory: Path, jar: Jar, repository: str, progress: _Progress, stop: threading.Event) -> None:
    url = f"{repository.rstrip('/')}/{jar.path}"
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _fetch_once(directory, jar, url, progress, stop)
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == _ATTEMPTS:
                raise _unreachable(url, f"HTTP status {error.code} {error.reason}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            if attempt == _ATTEMPTS:
                raise _unreachable(url, str(getattr(error, "reason", error))) from error
        if clock.wait(stop, 0.5 * attempt):
            raise Interrupted
    raise AssertionError("the last attempt returns or raises")


def _fetch_once(directory: Path, jar: Jar, url: str, progress: _Progress, stop: threading.Event) -> None:
    digest, size = hashlib.sha256(), 0
    with _temporary(directory, jar) as file:
        with urllib.request.urlopen(url, timeout=30) as answer:
            while chunk := answer.read(_CHUNK):
                if stop.is_set():
                    raise Interrupted
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                progress.add(len(chunk))
        if digest.hexdigest() != jar.sha256:
            raise _corrupt(url, jar, digest.hexdigest(), size)
        file.flush()
        os.fsync(file.fileno())
        os.chmod(file.name, 0o644)
        os.rename(file.name, directory / jar.file_name)


@contextmanager
def _temporary(directory: Path, jar: Jar) -> Iterator[IO[bytes]]:
    with NamedTemporaryFile(dir=directory, prefix=f".{jar.file_name}.", delete=False) as file:
        try:
            yield file
        finally:
            # Renamed when all was well; anything else must not fill the cache.
            Path(file.name).unlink(missing_ok=True)


def _unreachable(url: str, reason: str) -> Unreachable:
    return Unreachable(
        f"{url} cannot be downloaded: {reason}.",
        remedy=f"Check the network, or set {REPOSITORY_SETTING} to a mirror, and run it again: the jars that "
        "arrived are kept.",
    )


def _corrupt(url: str, jar: Jar, sha256: str, size: int) -> ConfigurationError:
    return ConfigurationError(
        f"The download of {jar.file_name} is corrupt and was thrown away: {size} bytes with sha256 {sha256[:12]}… "
        f"instead of {jar.size} bytes with {jar.sha256[:12]}… from {url}.",
        remedy=f"Run it again; if it stays so, something between here and the repository changes files: set "
        f"{REPOSITORY_SETTING} to another mirror.",
    )
