"""A tier of its own: collected only when it is asked for by name (`make test-containers`)."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from testcontainers.core.config import ConnectionMode, testcontainers_config

from tests.containers import build_images
from tests.containers.engine import CannotRun, Engine, running

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """These need a container engine, and minutes: `pytest tests` leaves them out."""
    asked_for = any((config.invocation_params.dir / arg.split("::")[0]).is_relative_to(HERE) for arg in config.args)
    return None if asked_for else True


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """A Docker API with all images; what it lacks ends the run at once, with the command that installs it."""
    patch = pytest.MonkeyPatch()
    # A time limit from outside must not leave an engine running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running() as found:
            build_images.build(found)
            for name, value in found.variables.items():
                patch.setenv(name, value)
            if found.podman is not None:
                _tell_testcontainers(patch)
            yield found
    except CannotRun as error:
        pytest.exit(f"THE CONTAINER TESTS CANNOT RUN. {error}", returncode=3)
    finally:
        patch.undo()


def _tell_testcontainers(patch: pytest.MonkeyPatch) -> None:
    """It read the variables when it was imported; what a user sets before the start arrives late here."""
    # The container that removes containers cannot be pulled; the engine removes them itself.
    patch.setattr(testcontainers_config, "ryuk_disabled", True)
    patch.setattr(testcontainers_config, "connection_mode_override", ConnectionMode.docker_host)
    patch.setattr(testcontainers_config, "tc_host_override", "127.0.0.1")
