"""Images under the names that docker-compose.yml and the Dockerfile use, made of Debian's packages and our Kafka jars.

    python -m tests.containers.build_images [--install]

For machines that reach no image registry. They stand in for the real ones: same names, paths, users, ports, variables
and versions, so what is proved with them is our part, not the real images. Kept in a store of their own and made anew
when what they are made from changes.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from docker import DockerClient
from docker.errors import BuildError, ImageNotFound

from eoframework import clock
from eoframework.dev import cache, jars
from eoframework.errors import EoError
from eoframework.testing.containers import KAFKA_IMAGE, POSTGRES_IMAGE
from tests.containers.engine import CannotRun, Engine, Podman, install, running

RELEASE = "trixie"
"""Debian's release whose PostgreSQL and Python are the ones that the images' names promise."""
POSTGRES_MAJOR = POSTGRES_IMAGE.rpartition(":")[2]
PYTHON_IMAGE = "python:3.13-slim"
DEBIAN_IMAGE = "localhost/eo-debian"
_PACKAGES = ["openjdk-21-jre-headless", f"postgresql-{POSTGRES_MAJOR}", "python3-venv", "ca-certificates"]
_LABEL = "eoframework.made-from"
_JARS = "libs"
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_RECIPES = Path(__file__).with_name("images")


def build(engine: Engine) -> None:
    """All images are in the engine's store; those that are there and up to date are not made again."""
    if engine.podman is None:
        return
    client = engine.client()
    try:
        made_from = _digest(_PACKAGES, RELEASE)
        if not _up_to_date(client, DEBIAN_IMAGE, made_from):
            _say(f"a base image of Debian {RELEASE} (once; two or three minutes)")
            _bootstrap(engine.podman, made_from)
        _derive(client, KAFKA_IMAGE, "kafka", made_from, {_JARS: jars.LIST.read_text()})
        _derive(client, POSTGRES_IMAGE, "postgres", made_from, {})
        _derive(
            client,
            PYTHON_IMAGE,
            "python",
            made_from,
            {"pip.conf": _pip_configuration(), "ca-certificates.crt": _CERTIFICATES.read_text()},
        )
    finally:
        client.close()


def _bootstrap(podman: Podman, made_from: str) -> None:
    with tempfile.TemporaryDirectory(prefix="eo-debian-", dir=podman.home, ignore_cleanup_errors=True) as directory:
        root = Path(directory) / "root"
        include = f"--include={','.join(_PACKAGES)}"
        log = podman.home / "debootstrap.log"
        with log.open("w") as output:
            done = subprocess.run(
                ["debootstrap", "--variant=minbase", include, RELEASE, str(root), *_mirror()],
                stdout=output,
                stderr=output,
                check=False,
            )
        # It leaves this mounted; deleting through it would be deleting through the kernel's door.
        subprocess.run(["umount", "--quiet", str(root / "proc")], capture_output=True, check=False)
        if done.returncode != 0:
            raise CannotRun(f"debootstrap failed; the end of {log}:\n{_tail(log)}")
        _import(podman, root, made_from)


def _import(podman: Podman, root: Path, made_from: str) -> None:
    unneeded = ["./var/cache/apt/*", "./var/lib/apt/lists/*", "./usr/share/doc/*", "./usr/share/man/*", "./proc/*"]
    tar = ["tar", "-C", str(root), "--one-file-system", *(f"--exclude={path}" for path in unneeded), "-c", "."]
    packing = subprocess.Popen(tar, stdout=subprocess.PIPE)
    imported = subprocess.run(
        podman.command("import", "--quiet", "--change", f"LABEL {_LABEL}={made_from}", "-", DEBIAN_IMAGE),
        stdin=packing.stdout,
        env=podman.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if packing.wait() != 0 or imported.returncode != 0:
        raise RuntimeError(f"the base image could not be stored: {imported.stderr}")


def _derive(client: DockerClient, name: str, recipe: str, base: str, besides: Mapping[str, str]) -> None:
    """Build one image from its folder and what that cannot hold: files by name, the jars by their list."""
    folder = _RECIPES / recipe
    files = sorted(path for path in folder.iterdir() if path.is_file())
    made_from = _digest([base, *(path.name + path.read_text() for path in files), *besides.values()])
    if _up_to_date(client, name, made_from):
        return
    _say(name)
    with tempfile.TemporaryDirectory(prefix="eo-image-") as directory:
        context = Path(directory) / "context"
        shutil.copytree(folder, context)
        for file, content in besides.items():
            if file == _JARS:
                _copy_jars(context / file)
            else:
                (context / file).write_text(content)
        _build(client, context, name, made_from)


def _build(client: DockerClient, context: Path, name: str, made_from: str) -> None:
    try:
        client.images.build(
            path=str(context),
            tag=name,
            labels={_LABEL: made_from},
            buildargs={"MAJOR": POSTGRES_MAJOR},
            rm=True,
            forcerm=True,
        )
    except BuildError as error:
        log = "".join(str(line.get("stream", "")) for line in error.build_log if isinstance(line, dict))
        raise RuntimeError(f"{name} could not be built: {error}\n{log}") from error


def _copy_jars(target: Path) -> None:
    target.mkdir()
    for jar in jars.ensure(
        cache.directory() / "kafka-jars",
        repository=cache.maven_repository(),
        downloaded=lambda _done, _total: None,
        jars=jars.pinned(),
    ):
        shutil.copy(jar, target)


def _up_to_date(client: DockerClient, name: str, made_from: str) -> bool:
    try:
        return bool(client.images.get(name).labels.get(_LABEL) == made_from)
    except ImageNotFound:
        return False


def _mirror() -> list[str]:
    """The Debian mirror that this machine's apt uses; none: debootstrap's default."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.split()[:1]


def _pip_configuration() -> str:
    """Where pip on this machine gets its packages from: a container has to use the same place."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    wanted = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in ("index-url", "extra-index-url", "trusted-host"):
            wanted[key] = value.strip("'")
    return "\n".join(["[global]", *(f"{key} = {value}" for key, value in wanted.items()), ""])


def _digest(parts: list[str], *more: str) -> str:
    return hashlib.sha256("\0".join([*parts, *more]).encode()).hexdigest()[:16]


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-10:])


def _say(what: str) -> None:
    print(f"building {what} ...", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="install the packages that are missing, by apt-get")
    given = parser.parse_args()
    # A time limit from outside must not leave an engine running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = clock.monotonic()
    try:
        if given.install:
            install()
        with running() as engine:
            build(engine)
    except (CannotRun, EoError) as error:
        # An EoError: the jars cannot be downloaded.
        print(f"THE CONTAINER TESTS CANNOT RUN. {error}", file=sys.stderr)
        return 3
    print(f"the images are there, after {clock.monotonic() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
