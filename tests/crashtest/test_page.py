"""docs/crashtest.md is a project that works as it is told there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from eoframework.settings import environment
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs/crashtest.md").read_text()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The page's files, each named in its first line."""
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", PAGE, re.S)
    assert [name for name, _ in blocks] == ["shop.py", "conftest.py", "test_shop.py", "test_crashes.py"]
    for name, content in blocks:
        (tmp_path / name).write_text(content)
    return tmp_path


def run(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in environment().items() if not name.startswith("EO_")}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=project, env=variables, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("file", ["test_shop.py", "test_crashes.py"])
def test_its_tests_pass(project: Path, file: str) -> None:
    done = run(project, "pytest", "-q", "-p", "no:cacheprovider", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_command_finds_nothing(project: Path) -> None:
    (command,) = re.findall(r"```bash\neo (crashtest .*?)\n```", PAGE)
    done = run(project, "eoframework.cli", *command.split(), "--messages", "8", "--points", "db.committed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 violations in" in done.stdout
