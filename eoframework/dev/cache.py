"""Where downloads are kept, and from where they come."""

from __future__ import annotations

from pathlib import Path

from eoframework.dev.jars import REPOSITORY_SETTING
from eoframework.settings import environment


def directory() -> Path:
    """This user's cache (XDG base directory specification)."""
    return Path(environment().get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eoframework"


def maven_repository() -> str | None:
    """The repository the user chose; None for Maven Central."""
    return environment().get(REPOSITORY_SETTING) or None
