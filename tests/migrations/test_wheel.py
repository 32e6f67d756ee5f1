"""From the built wheel in an empty environment: the version files come along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from eoframework.db import migrating
from eoframework.settings import environment
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def eo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `eo` of a wheel built from this checkout, installed where nothing else is."""
    directory = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", str(directory / "dist"), str(REPOSITORY))
    (wheel,) = (directory / "dist").glob("*.whl")
    # A pip of its own would take four seconds of processor time.
    _run(sys.executable, "-m", "venv", "--without-pip", str(directory / "venv"))
    pip = [sys.executable, "-m", "pip", "--python", str(directory / "venv/bin/python")]
    _run(*pip, "install", "--quiet", str(wheel))
    return directory / "venv/bin/eo"


def test_an_installed_wheel_migrates(eo: Path, empty_url: str, tmp_path: Path) -> None:
    settings = {"EO_DATABASE_URL": empty_url, "EO_DATABASE_SCHEMA": "shop_eo"}

    def run(*arguments: str, code: int = 0) -> str:
        return _run(str(eo), *arguments, code=code, cwd=tmp_path, **settings)

    assert "Run: eo db upgrade" in run("db", "check", code=3)
    assert json.loads(run("db", "upgrade", "--json")) == {"from": None, "to": migrating.head(), "schema": "shop_eo"}
    assert json.loads(run("db", "current", "--json"))["version"] == migrating.head()
    run("db", "check")
    assert 'CREATE TABLE "shop_eo".outbox_message' in run("db", "sql")
    assert "no tables" in run("db", "downgrade", "base")
    run("db", "check", code=3)


def test_every_command_of_an_installed_wheel_loads(eo: Path, tmp_path: Path) -> None:
    """Seen to fail without sqlalchemy's asyncio extra: greenlet was there only through the tools."""
    for command in ("run", "relay", "topics", "publish", "position", "db", "dev"):
        assert "Usage" in _run(str(eo), command, "--help", cwd=tmp_path)


def _run(*command: str, code: int = 0, cwd: Path | None = None, **settings: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=environment(**settings), capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + (done.stderr if code else "")
