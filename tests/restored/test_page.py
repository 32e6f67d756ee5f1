"""docs/restore.md quotes errors that exist, and commands that do."""

from __future__ import annotations

import re

import pytest

from eoframework.cli import invoke
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "restore.md").read_text()
# As the sentences read: literals that stand in several lines, and braces with what is filled in, taken together.
SOURCE = re.sub(
    r"\{[^{}]*\}",
    "#",
    re.sub(r'"\s*\n\s*f?"', "", "".join(p.read_text() for p in REPOSITORY.glob("eoframework/**/*.py"))),
)


def quoted() -> list[str]:
    return sorted({re.sub(r"\s+", " ", found) for found in re.findall(r'"([^"`]+)"', PAGE)})


@pytest.mark.parametrize("words", quoted())
def test_each_error_of_the_page_is_one_of_ours(words: str) -> None:
    assert re.sub(r"\d+|…", "#", words).removesuffix(" #") in SOURCE


def test_each_command_of_the_page_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    named = {tuple(words.split()) for words in re.findall(r"\beo ((?:db|outbox|position|topics) [a-z]+)", PAGE)}
    assert {("db", "adopt"), ("outbox", "adopt"), ("position", "set"), ("position", "forget")} <= named
    for command in named:
        assert invoke([*command, "--help"]) == 0
    for option in ("--unknown", "--adopt-offsets"):
        assert option in PAGE
    invoke(["outbox", "adopt", "--help"])
    assert "--unknown" in capsys.readouterr().out
