"""What `eo` says of itself, and how little it loads for that."""

from __future__ import annotations

import subprocess
import sys

import pytest

from eoframework.cli import COMMANDS

_LOADED = """
import sys
from eoframework.cli import invoke
code = invoke({arguments!r})
heavy = [name for name in ("sqlalchemy", "confluent_kafka", "pydantic", "psycopg", "alembic") if name in sys.modules]
print("LOADED", code, heavy)
"""


def loaded(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _LOADED.format(arguments=list(arguments))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("--version",)])
def test_help_loads_none_of_the_heavy_modules(arguments: tuple[str, ...]) -> None:
    """Seen to fail with an import of the settings at the top of cli/__init__.py: it is what makes help fast."""
    assert "LOADED 0 []" in loaded(*arguments)


def test_help_lists_every_command_and_the_exit_codes() -> None:
    text = loaded("--help")
    assert all(name in text for name in COMMANDS)
    assert all(code in text for code in ("69", "70", "75", "130/143"))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str) -> None:
    assert "LOADED 0" in loaded(name, "--help")


@pytest.mark.parametrize("arguments", [("nonsense",), ("db", "nonsense"), ("run",), ("run", "a:b", "--workers", "0")])
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    assert "LOADED 2" in loaded(*arguments)
