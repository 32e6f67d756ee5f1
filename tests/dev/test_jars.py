"""Kafka's jars: pinned, verified, replaced when damaged, explained when they cannot be had."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from eoframework.dev import jars
from eoframework.dev.jars import Jar
from eoframework.dev.processes import free_port
from eoframework.dev.state import KafkaState, PostgresState, State, StateDirectory
from eoframework.errors import ConfigurationError, Unreachable


@pytest.fixture
def two() -> list[Jar]:
    return [
        Jar(
            group="org.example",
            artifact=name,
            version="1.0",
            sha256=hashlib.sha256(content).hexdigest(),
            size=len(content),
        )
        for name, content in (("first", b"1" * 300_000), ("second", b"2" * 10))
    ]


@pytest.fixture
def repository(tmp_path: Path, two: list[Jar]) -> Path:
    root = tmp_path / "repository"
    for jar, byte in zip(two, (b"1", b"2"), strict=True):
        (root / jar.path).parent.mkdir(parents=True)
        (root / jar.path).write_bytes(byte * jar.size)
    return root


@pytest.fixture
def ensure(tmp_path: Path, two: list[Jar], repository: Path) -> Callable[..., list[tuple[int, int]]]:
    def download(address: str | None = None) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        jars.ensure(
            tmp_path / "cache",
            repository=address or repository.as_uri(),
            downloaded=lambda done, total: seen.append((done, total)),
            jars=two,
        )
        return seen

    return download


def cached(tmp_path: Path) -> list[str]:
    return sorted(file.name for file in (tmp_path / "cache").iterdir() if file.name != ".lock")


def test_downloads_once_and_tells_progress(tmp_path: Path, ensure: Callable[..., list[tuple[int, int]]]) -> None:
    assert ensure()[-1] == (300_010, 300_010)
    assert cached(tmp_path) == ["first-1.0.jar", "second-1.0.jar"]
    assert ensure() == []


def test_damaged_jar_in_the_cache_is_replaced(tmp_path: Path, ensure: Callable[..., list[tuple[int, int]]]) -> None:
    """Same size, one byte wrong. Seen to fail with the digest comparison of `_intact` removed."""
    ensure()
    damaged = tmp_path / "cache" / "second-1.0.jar"
    damaged.write_bytes(b"2222222223")
    assert ensure()[-1] == (10, 10)
    assert damaged.read_bytes() == b"2" * 10


def test_corrupt_download_is_refused_and_thrown_away(
    tmp_path: Path, repository: Path, two: list[Jar], ensure: Callable[..., list[tuple[int, int]]]
) -> None:
    """Seen to fail with the digest comparison of `_fetch_once` removed."""
    (repository / two[1].path).write_bytes(b"not it at all")
    with pytest.raises(ConfigurationError, match=r"second-1\.0\.jar is corrupt and was thrown away") as caught:
        ensure()
    assert "EO_DEV_MAVEN_REPOSITORY" in caught.value.remedy
    assert set(cached(tmp_path)) <= {"first-1.0.jar"}


def test_unreachable_repository_names_the_address(ensure: Callable[..., list[tuple[int, int]]]) -> None:
    address = f"http://127.0.0.1:{free_port()}/maven"
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1.*Connection refused") as caught:
        ensure(address)
    assert "EO_DEV_MAVEN_REPOSITORY" in caught.value.remedy


def test_two_projects_download_once(ensure: Callable[..., list[tuple[int, int]]]) -> None:
    """Seen to fail with the `flock` of `_one_at_a_time` removed."""
    seen: list[list[tuple[int, int]]] = []
    threads = [threading.Thread(target=lambda: seen.append(ensure())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert len([progress for progress in seen if progress]) == 1


def test_the_checked_in_list_is_whole() -> None:
    pinned = jars.pinned()
    names = {jar.file_name for jar in pinned}
    assert f"kafka_2.13-{jars.KAFKA_VERSION}.jar" in names
    assert any(jar.artifact == "slf4j-simple" for jar in pinned)
    assert len(names) == len(pinned) == 46
    assert all(len(jar.sha256) == 64 and jar.size > 0 for jar in pinned)


def test_full_disk_is_one_sentence_and_keeps_the_old_state(tmp_path: Path) -> None:
    """The kernel's own ENOSPC, from /dev/full under the name of the temporary file."""
    directory = StateDirectory(tmp_path)
    directory.prepare()
    directory.save(State(kafka=[KafkaState(port=1)], postgres=PostgresState()))
    temporary = directory.temporary
    temporary.symlink_to("/dev/full")
    with pytest.raises(ConfigurationError, match="is full") as caught:
        directory.save(State(kafka=[KafkaState(port=2)], postgres=PostgresState()))
    assert "Free" in caught.value.remedy
    assert directory.load().kafka[0].port == 1
    assert not temporary.is_symlink()
