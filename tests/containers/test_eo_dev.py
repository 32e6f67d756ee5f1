"""`eo dev up --docker`, down, status and reset, as a person types them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from tests.conftest import REPOSITORY
from tests.containers.engine import Engine, compose
from tests.containers.wire import commit, committed


@dataclass
class Person:
    """Somebody with a project directory and a shell."""

    state: Path
    environment: dict[str, str]

    def eo_dev(self, command: str, *options: str, code: int = 0, **variables: str) -> str:
        """Run `eo dev COMMAND`; returns what it printed on both outputs."""
        done = self.run([command, f"--state-dir={self.state}", *options], variables)
        assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def up(self, *options: str) -> dict[str, str]:
        done = self.run(["up", f"--state-dir={self.state}", "--json", *options], {})
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def run(self, arguments: Sequence[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "eoframework.cli", "dev", *arguments],
            cwd=REPOSITORY,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )


@pytest.fixture
def person(engine: Engine, tmp_path: Path) -> Iterator[Person]:
    somebody = Person(tmp_path / "stock" / ".eo", {**os.environ, **engine.variables})
    yield somebody
    if (somebody.state / "docker.json").exists():
        somebody.eo_dev("reset")


def project_of(person: Person) -> str:
    return str(json.loads((person.state / "docker.json").read_text())["project"])


def names(engine: Engine, kind: str, project: str) -> set[str]:
    """The containers or volumes of a compose project."""
    client = engine.client()
    try:
        everything = client.containers.list(all=True) if kind == "containers" else client.volumes.list()
        return {each.name for each in everything if each.name.startswith(project)}
    finally:
        client.close()


def kill(engine: Engine, project: str, service: str) -> None:
    client = engine.client()
    try:
        (container,) = [
            each for each in client.containers.list() if each.name.startswith(project) and service in each.name
        ]
        container.kill()
    finally:
        client.close()


def test_the_life_of_the_containers(person: Person, engine: Engine) -> None:
    first = person.up("--docker")
    assert first["found_running"] is False
    commit(first["EO_KAFKA_BOOTSTRAP_SERVERS"], "kept", b"42")
    with psycopg.connect(first["EO_DATABASE_URL"].replace("+psycopg", "")) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")

    # Found again, without saying --docker.
    again = person.up()
    assert again == {**first, "found_running": True}
    told = json.loads(person.eo_dev("status", "--json"))
    assert [told[name]["state"] for name in ("kafka", "postgres")] == ["running", "running"]
    assert person.eo_dev("up").count("export EO_") == 2
    project = project_of(person)
    assert len(names(engine, "containers", project)) == len(names(engine, "volumes", project)) == 2

    # A broker that died is told, and started again with its data.
    kill(engine, project, "kafka")
    assert "dead" in person.eo_dev("status", code=69)
    assert_kept(person.up())

    # Stopped, nothing but the data is left; they are there the next time.
    person.eo_dev("down")
    assert "stopped" in person.eo_dev("status", code=69)
    assert not names(engine, "containers", project)
    assert_kept(person.up())

    person.eo_dev("reset")
    assert not names(engine, "containers", project) | names(engine, "volumes", project)
    assert not person.state.exists()


def assert_kept(services: dict[str, str]) -> None:
    assert services["found_running"] is False
    assert committed(services["EO_KAFKA_BOOTSTRAP_SERVERS"], "kept") == [b"42"]
    with psycopg.connect(services["EO_DATABASE_URL"].replace("+psycopg", "")) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchall() == [(42,)]


def test_a_command_runs_with_the_containers_and_they_stop_with_it(person: Person, engine: Engine) -> None:
    person.up("--docker")
    person.eo_dev("down")
    project = project_of(person)
    shown = person.run(["run", f"--state-dir={person.state}", "--", "sh", "-c", "echo $EO_DATABASE_URL; exit 7"], {})
    assert shown.returncode == 7
    assert shown.stdout.startswith("postgresql+psycopg://eo:")
    assert not names(engine, "containers", project)


def test_a_port_in_use_is_named_and_nothing_is_left(person: Person, engine: Engine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = person.eo_dev("up", "--docker", f"--kafka-port={port}", code=3)
    assert f"Port {port} for Kafka is in use by another program" in said


def test_no_daemon_is_told_with_what_to_do(person: Person) -> None:
    said = person.eo_dev("up", "--docker", code=69, DOCKER_HOST=f"unix://{person.state}/nowhere.sock")
    assert "reaches no Docker daemon" in said
    assert "DOCKER_HOST" in said
    assert "`eo dev up` needs no Docker" in said
    # The directory can be used without Docker as before.
    assert not (person.state / "docker.json").exists()


def test_three_brokers_are_not_offered(person: Person) -> None:
    assert "one broker" in person.eo_dev("up", "--docker", "--brokers=3", code=2)


def test_the_compose_file_is_valid() -> None:
    subprocess.run([*compose(), "-f", "docker-compose.yml", "config", "-q"], cwd=REPOSITORY, check=True)
