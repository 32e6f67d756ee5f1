"""`eo run` and `eo topics` of an app that has transforms and no handlers."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tests.cli.conftest import Shell
from tests.processes import eventually, produce, read_topic

APP = "tests.cli.copiers:app"


def send(shell: Shell, numbers: range) -> None:
    for partition in (0, 1):
        lines = [(None, b'{"order_id": %d}' % number) for number in numbers if number % 2 == partition]
        produce(shell.settings.require_bootstrap_servers(), shell.orders, lines, partition=partition)


def read(shell: Shell, topic: str) -> list[dict[str, Any]]:
    found = read_topic(shell.settings.require_bootstrap_servers(), f"{topic}.{shell.suffix}")
    return [json.loads(message.value() or b"") for message in found]


def copied(shell: Shell, topic: str = "copies") -> Counter[int]:
    return Counter(copy["order_id"] for copy in read(shell, topic))


@pytest.fixture
def copiers(bare_shell: Shell) -> Shell:
    bare_shell.run("topics", "apply", APP)
    return bare_shell


def test_all_its_topics_are_asked_for_and_made(bare_shell: Shell) -> None:
    """Seen to fail with the targets, or the dead letter topics, left out of bootstrap.check_topics; and out of
    provision.dead_letter_topics.
    """
    shell, suffix = bare_shell, bare_shell.suffix
    said = shell.run("run", APP, code=3).stderr
    made = [shell.orders, f"copies.{suffix}", f"others.{suffix}", f"copiers-{suffix}.copy.dlt"]
    assert all(f"'{topic}'" in said for topic in made)
    assert f"Run: eo topics apply {APP}" in said
    # retry=None: it stops at a message that fails, so nothing is given up.
    assert "copy_all.dlt" not in said
    shell.run("topics", "apply", APP)
    assert all(shell.admin.describe(topic).partitions for topic in made)
    assert "copy_all.dlt" not in shell.run("topics", "plan", APP).stdout
    assert copied(shell) == Counter()


def test_it_runs_without_any_handler(copiers: Shell) -> None:
    send(copiers, range(20))
    said = copiers.run("run", APP, "--once", EO_LOG_FORMAT="text").stderr
    once_each = Counter(range(20))
    assert copied(copiers) == copied(copiers, "others") == once_each
    group, copies = f"copiers-{copiers.suffix}.copy", f"copies.{copiers.suffix}"
    assert f"{group} <- {copiers.orders}: exactly-once processing to {copies}, by position" in said
    assert "message ids are remembered" not in said
    copiers.run("run", APP, "--once", "--workers", "2")
    assert copied(copiers) == once_each


def test_handler_chooses_transforms_too(copiers: Shell) -> None:
    send(copiers, range(4))
    copiers.run("run", APP, "--once", "--handler", "copy_all")
    assert (copied(copiers), copied(copiers, "others")) == (Counter(), Counter(range(4)))
    said = copiers.run("run", APP, "--handler", "copy_al", code=5).stderr
    assert "no handler or transform 'copy_al'. Did you mean 'copy_all'?" in said


def test_a_transform_is_not_reprocessed(copiers: Shell) -> None:
    said = copiers.run("reprocess", APP, "copy", "--from", "earliest", code=3).stderr
    assert "'copy' is a transform" in said
    assert f"eo position set copiers-{copiers.suffix}.copy" in said


def test_workers_of_one_instance_do_not_fence_each_other(copiers: Shell) -> None:
    """Seen to fail with bootstrap._settings_of_worker returning the settings as they are: two processes take the same
    transactional.id, and each ends the other's transactions.
    """
    process = copiers.start("run", APP, "--workers", "2", "--handler", "copy", EO_INSTANCE="here", EO_LOG_FORMAT="text")
    sent = 0

    def both_worked() -> bool:
        nonlocal sent
        send(copiers, range(sent, sent + 2))
        sent += 2
        return len({copy["pid"] for copy in read(copiers, "copies")}) == 2

    eventually(both_worked, "each of the two has a partition", log=process.log)
    send(copiers, range(sent, sent + 100))
    everything = Counter(range(sent + 100))
    eventually(lambda: copied(copiers) == everything, "all copied", log=process.log)
    assert process.stop() == 0
    assert "was given up" not in process.log.read_text()
