"""Where the containers run: the Docker that is there, or else a podman of our own for the length of the tests."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from docker import DockerClient
from docker.errors import DockerException

from eoframework import clock
from eoframework.dev import cache

PACKAGES = {
    "podman": "podman",
    "runc": "runc",
    "iptables": "iptables",
    "debootstrap": "debootstrap",
    "/usr/lib/podman/netavark": "netavark",
    "/usr/lib/podman/aardvark-dns": "aardvark-dns",
}
COMPOSE = "docker-compose"
_START_SECONDS = 30.0


class CannotRun(Exception):
    """Something these tests need is missing; the text says what, and how it is got."""


@dataclass(frozen=True)
class Engine:
    """A Docker API, and the variables by which every client finds it."""

    variables: Mapping[str, str]
    podman: Podman | None
    """None: the user's own Docker, which pulls the real images."""

    def client(self) -> DockerClient:
        return DockerClient.from_env(environment={**os.environ, **self.variables}, timeout=600)


class Podman:
    """podman with an image store of its own, which other containers of this machine do not notice."""

    def __init__(self) -> None:
        self.home = cache.directory() / "test-containers"
        self.run = Path("/run/eoframework-test-containers")
        self.socket = self.run / "podman.sock"

    def command(self, *arguments: str) -> list[str]:
        """A podman command on our store."""
        places = ["--root", str(self.home / "store"), "--runroot", str(self.run), "--tmpdir", str(self.run / "tmp")]
        return ["podman", *places, "--runtime", str(shutil.which("runc")), *arguments]

    def call(self, *arguments: str) -> str:
        """Run a podman command to its end; returns what it printed."""
        done = subprocess.run(
            self.command(*arguments), env=self.environment(), capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"podman {' '.join(arguments)} failed: {done.stderr}")
        return done.stdout.strip()

    def environment(self) -> dict[str, str]:
        return {**os.environ, "CONTAINERS_CONF": str(self.home / "containers.conf")}

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Its Docker API answers at `socket`; nothing of it is left afterwards, but the images."""
        for directory in (self.home / "networks", self.run):
            directory.mkdir(parents=True, exist_ok=True)
        with (self.home / "lock").open("w") as lock:
            # Two runs at once would delete each other's containers below.
            fcntl.flock(lock, fcntl.LOCK_EX)
            (self.home / "containers.conf").write_text(_configuration(self.home / "networks"))
            # What a run that was killed left behind, and images of an app that is another one by now.
            self._clean()
            self.call("image", "prune", "--force")
            service = subprocess.Popen(
                self.command("system", "service", "-t", "0", f"unix://{self.socket}"),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=(self.home / "podman.log").open("w"),
                stderr=subprocess.STDOUT,
            )
            try:
                self._wait(service)
                yield
            finally:
                self._clean()
                service.terminate()
                service.wait(30)
                self._end_monitors()

    def _wait(self, service: subprocess.Popen[bytes]) -> None:
        deadline = clock.monotonic() + _START_SECONDS
        while not _answers(f"unix://{self.socket}"):
            if service.poll() is not None or clock.monotonic() > deadline:
                raise RuntimeError(f"podman does not serve: {(self.home / 'podman.log').read_text()}")
            clock.sleep(0.1)

    def _end_monitors(self) -> None:
        """Each command run in a container has one, which would stay for five minutes."""
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if command and Path(command[0]).name == "conmon" and any(str(self.run) in word for word in command):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def _clean(self) -> None:
        self.call("rm", "--all", "--force", "--time", "0", "--volumes")
        self.call("volume", "prune", "--force")
        self.call("network", "prune", "--force")


def install() -> None:
    """Install what is missing, where apt-get and root are. Raises CannotRun when that fails."""
    packages = _missing(podman=not _answers(None))
    if not packages:
        return
    for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
        try:
            done = subprocess.run(
                ["apt-get", "-qq", *command],
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                check=False,
            )
        except FileNotFoundError:
            raise CannotRun(f"There is no apt-get to install {', '.join(packages)} with.") from None
        if done.returncode != 0:
            raise CannotRun(f"apt-get {' '.join(command)} failed; what it said stands above.")


@contextmanager
def running() -> Iterator[Engine]:
    """A Docker API to test on. Raises CannotRun with the command that installs what is missing."""
    docker = _answers(None)
    _need(podman=not docker)
    if docker:
        yield Engine({}, None)
        return
    own = Podman()
    with own.serving():
        yield Engine({"DOCKER_HOST": f"unix://{own.socket}"}, own)


def compose() -> list[str]:
    """The compose command that is there."""
    plugin = ["docker", "compose"]
    return plugin if _works([*plugin, "version"]) else [COMPOSE]


def _need(*, podman: bool) -> None:
    missing = _missing(podman=podman)
    if missing:
        no_daemon = ", and no Docker daemon answers, instead of which podman would do" if podman else ""
        raise CannotRun(
            f"{', '.join(missing)}: not installed{no_daemon}. Start Docker with its compose plugin, or on Debian and "
            f"Ubuntu: apt-get update && apt-get install --no-install-recommends {' '.join(missing)}"
        )
    if podman and os.geteuid() != 0:
        raise CannotRun(
            "No Docker daemon answers, and podman with images made by debootstrap needs root. "
            "Start Docker, set DOCKER_HOST, or run this as root."
        )


def _missing(*, podman: bool) -> list[str]:
    """The packages that are not installed."""
    missing = [] if _works([*compose(), "version"]) else [COMPOSE]
    if podman:
        missing += [package for program, package in PACKAGES.items() if shutil.which(program) is None]
    return missing


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _answers(url: str | None) -> bool:
    """Whether a Docker API answers there; None: where DOCKER_HOST says, or the default."""
    try:
        client = DockerClient(base_url=url) if url else DockerClient.from_env()
        try:
            client.ping()
        finally:
            client.close()
    except DockerException:
        return False
    return True


def _configuration(networks: Path) -> str:
    """A container may have no more than we may give away: without CAP_SYS_RESOURCE podman's own limits are refused."""
    limits = [("nofile", resource.RLIMIT_NOFILE, 20_000), ("nproc", resource.RLIMIT_NPROC, 4_096)]
    quoted = []
    for name, number, wanted in limits:
        hard = resource.getrlimit(number)[1]
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        quoted.append(f'"{name}={most}:{most}"')
    return (
        f"[containers]\ndefault_ulimits = [{', '.join(quoted)}]\n"
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        f'[network]\nnetwork_backend = "netavark"\nnetwork_config_dir = "{networks}"\n'
    )
