"""Homes outside of the state directory, for root's PostgreSQL user where the project is closed to it (below /root)."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from eoframework.dev.jars import disk_error
from eoframework.errors import ConfigurationError

DIRECTORY = Path("/var/tmp/eoframework")
PROGRAMS = DIRECTORY / "programs"
_HOMES = DIRECTORY / "homes"
_OWNER_FILE = "state-directory"


def home_for(state_directory: Path) -> Path:
    """The home that belongs to this state directory, made when missing; homes whose project is gone are deleted.

    Raises ConfigurationError when the place belongs to somebody else (it is in a directory that all may write to).
    """
    try:
        for directory in (DIRECTORY, _HOMES):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            _refuse_strangers(directory)
        _delete_orphans()
        home = _HOMES / hashlib.sha256(os.fsencode(state_directory)).hexdigest()[:16]
        home.mkdir(exist_ok=True)
        (_HOMES / f"{home.name}.{_OWNER_FILE}").write_text(str(state_directory))
    except OSError as error:
        raise disk_error(error, DIRECTORY) from error
    return home


def _refuse_strangers(directory: Path) -> None:
    if directory.is_symlink() or directory.stat().st_uid != os.geteuid():
        raise ConfigurationError(
            f"{directory} belongs to another user.",
            remedy="Delete it, or put the project where PostgreSQL's user may go.",
        )


def _delete_orphans() -> None:
    # A project directory deleted without `eo dev reset` (tests in temporary directories) would leave 40 MB each.
    for owner in _HOMES.glob(f"*.{_OWNER_FILE}"):
        # Another start may be deleting the same ones.
        with suppress(FileNotFoundError):
            if not Path(owner.read_text()).exists():
                shutil.rmtree(_HOMES / owner.name.removesuffix(f".{_OWNER_FILE}"), ignore_errors=True)
                owner.unlink()
