"""Services in containers, as far as it shows without any: the compose file, and what is said without Docker."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eoframework.dev import docker_compose, docker_stack
from eoframework.dev.jars import KAFKA_VERSION
from eoframework.dev.kafka import KafkaOptions
from eoframework.dev.kafka_properties import behaviour
from eoframework.dev.postgres import BEHAVIOUR
from eoframework.dev.state import PostgresState, State, StateDirectory
from eoframework.errors import ConfigurationError
from eoframework.testing.containers import KAFKA_IMAGE, POSTGRES_IMAGE
from tests.dev.conftest import eo_dev, finish

ELSEWHERE = {
    # Addresses and directories, which are a container's own.
    *("process.roles", "node.id", "controller.quorum.voters", "controller.listener.names", "listeners"),
    *("inter.broker.listener.name", "advertised.listeners", "listener.security.protocol.map", "log.dirs", "heap.opts"),
}


def compose_file() -> str:
    return docker_compose.file().read_text()


def test_the_broker_in_the_container_behaves_as_that_of_eo_dev() -> None:
    variables = dict(re.findall(r'^ +KAFKA_(\w+): "(.*)"$', compose_file(), re.MULTILINE))
    properties = {name.lower().replace("_", "."): value for name, value in variables.items()}
    ours = behaviour(brokers=1, session_timeout_ms=KafkaOptions().session_timeout_ms)
    assert {name: value for name, value in properties.items() if name not in ELSEWHERE} == ours


def test_the_server_in_the_container_behaves_as_that_of_eo_dev() -> None:
    told = re.search(r'^ +command: (\["postgres".*\])$', compose_file(), re.MULTILINE)
    assert told is not None
    words = json.loads(told[1])
    assert words[1::2] == ["-c"] * (len(words) // 2)
    assert dict(word.split("=", 1) for word in words[2::2]) == BEHAVIOUR


def test_the_images_are_those_of_the_testcontainers() -> None:
    assert re.findall(r"^ +image: (\S+)$", compose_file(), re.MULTILINE) == [KAFKA_IMAGE, POSTGRES_IMAGE]
    assert KAFKA_IMAGE.endswith(f":{KAFKA_VERSION}")


def test_without_docker_it_says_what_to_do_and_the_directory_stays_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, _, said = finish(eo_dev("up", "--docker", "--state-dir", tmp_path / ".eo"))
    assert code == 3
    assert "there is no docker on PATH" in said
    assert "`eo dev up` needs no Docker" in said
    assert not docker_stack.chosen(tmp_path / ".eo")


def test_a_directory_has_containers_or_processes_never_both(tmp_path: Path) -> None:
    """Else its data would seem to be gone, and the other services would run on, unseen."""
    directory = StateDirectory(tmp_path / ".eo")
    directory.prepare()
    directory.save(State(kafka=[], postgres=PostgresState()))
    with pytest.raises(ConfigurationError, match="are no containers") as caught:
        docker_stack.chosen(directory.path, asked=True)
    assert "eo dev reset" in caught.value.remedy
    assert not docker_stack.chosen(directory.path)


def test_an_unreadable_state_is_named(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / ".eo")
    directory.prepare()
    (directory.path / "docker.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"docker\.json cannot be used"):
        docker_stack.status(directory.path)
