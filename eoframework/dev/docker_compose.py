"""The compose program, and docker-compose.yml as it asks for it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eoframework.errors import ConfigurationError, Unreachable
from eoframework.settings import environment

FILE_NAME = "docker-compose.yml"
SERVICES = ("kafka", "postgres")

_PACKAGE = Path(__file__).resolve().parent
_NATIVE = "or leave --docker out: `eo dev up` needs no Docker."
_NO_DAEMON = (
    "Cannot connect to the Docker daemon",
    "Couldn't connect to Docker daemon",
    "Error while fetching server API version",
)
_TAKEN = ("port is already allocated", "address already in use")
_LINES = 3


def file() -> Path:
    """Where docker-compose.yml is: inside the package of an installed wheel, at the root of a checkout."""
    for directory in (_PACKAGE, _PACKAGE.parent.parent):
        if (directory / FILE_NAME).is_file():
            return directory / FILE_NAME
    raise ConfigurationError(f"eoframework's {FILE_NAME} is missing.", remedy="Install eoframework again.")


def find() -> list[str]:
    """The command that works here: `docker compose`, else docker-compose. Raises ConfigurationError with the remedy."""
    for command in (["docker", "compose"], ["docker-compose"]):
        # A docker without its compose plugin is common, so it has to be asked.
        if shutil.which(command[0]) and _asked([*command, "version"]).returncode == 0:
            return command
    there = "docker is there, but its compose plugin is not" if shutil.which("docker") else "there is no docker on PATH"
    raise ConfigurationError(
        f"The services cannot run in containers: {there}, and no docker-compose either.",
        remedy=f"Install Docker with its compose plugin, {_NATIVE}",
    )


@dataclass(frozen=True, kw_only=True)
class Project:
    """The containers, network and volumes of one name; `variables` are what docker-compose.yml asks for."""

    name: str
    command: Sequence[str]
    variables: Mapping[str, str]

    def up(self) -> None:
        """Create and start what does not run; images that are not there are pulled."""
        self._call("up", "-d")

    def stop(self) -> None:
        """Stop the containers and remove them and their network; the volumes, and so the data, stay."""
        self._call("down", "--remove-orphans")

    def delete(self) -> None:
        """Stop and remove everything, the data too."""
        self._call("down", "--remove-orphans", "--volumes")

    def runs(self, service: str) -> bool:
        """Whether the service's container runs (its process may not be ready)."""
        return self._run("exec", "-T", service, "true").returncode == 0

    def log(self, service: str) -> str:
        """The end of the service's log."""
        return self._run("logs", "--no-color", "--tail", "400", service).stdout

    def log_command(self, service: str) -> str:
        """What a person types to read that log."""
        return " ".join([*self.command, "-p", self.name, "-f", str(file()), "logs", service])

    def _call(self, *arguments: str) -> None:
        done = self._run(*arguments)
        if done.returncode != 0:
            raise self._failed(arguments[0], done.stderr)

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return _asked([*self.command, "-p", self.name, "-f", str(file()), *arguments], self.variables)

    def _failed(self, what: str, said: str) -> ConfigurationError | Unreachable:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        told = " ".join(lines[-_LINES:]) or "it said nothing"
        if any(sign in said for sign in _NO_DAEMON):
            return Unreachable(
                f"`{' '.join(self.command)} {what}` reaches no Docker daemon: {told}",
                remedy=f"Start Docker, or set DOCKER_HOST to where it is, {_NATIVE}",
            )
        if any(sign in said for sign in _TAKEN):
            return ConfigurationError(
                f"A port of the containers is in use by another program: {told}",
                remedy="Stop that program, or choose other ports with --kafka-port and --postgres-port.",
            )
        return Unreachable(
            f"`{' '.join(self.command)} {what}` failed: {told}",
            remedy=f"Correct what it says and run this again, {_NATIVE}",
        )


def _asked(command: Sequence[str], variables: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment(**(variables or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
