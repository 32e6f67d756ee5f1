"""Tests in several processes (pytest-xdist) on one broker and one server: most of them wait, and do not compute."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from eoframework import dev

ADDRESSES = "eo_services"
STATE = ".eo"
REPOSITORY = Path(__file__).resolve().parent.parent


def start_services(directory: Path) -> dev.Services:
    """The run's broker and server. No test crashes this server, so nothing has to reach its disk."""
    settings = {"fsync": "off", "full_page_writes": "off"}
    return dev.start(directory / STATE, postgres=dev.PostgresOptions(settings=settings))


def services_of_the_settings() -> tuple[str, str] | None:
    """The URL and the servers that EO_ settings point at."""
    url, servers = os.environ.get("EO_DATABASE_URL"), os.environ.get("EO_KAFKA_BOOTSTRAP_SERVERS")
    return (url, servers) if url and servers else None


def told_by_the_controller(config: pytest.Config) -> tuple[str, str] | None:
    """The URL and the servers that the process which hands out the tests has started; None in a run without workers."""
    told = getattr(config, "workerinput", {}).get(ADDRESSES)
    return None if told is None else (told[0], told[1])


class Controller:
    """Of the process that hands out the tests, which outlives each worker: the services belong to it."""

    def __init__(self) -> None:
        self._services: dev.Services | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def pytest_configure_node(self, node: Any) -> None:
        """Before each worker starts: it is told where the services answer, unless settings of the run say so."""
        if services_of_the_settings() is not None:
            return
        if self._services is None:
            self._directory = tempfile.TemporaryDirectory(prefix="eo-tests-")
            self._services = start_services(Path(self._directory.name))
        node.workerinput[ADDRESSES] = (self._services.database_url, self._services.bootstrap_servers)

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> LoadScopeScheduling:
        return Scheduling(config, log)

    def pytest_unconfigure(self) -> None:
        if self._directory is not None:
            dev.reset(Path(self._directory.name) / STATE)
            self._directory.cleanup()


class Worker:
    """Of each process that runs tests: what it reports can be sent."""

    @pytest.hookimpl(wrapper=True)
    def pytest_report_to_serializable(self) -> Generator[None, object, object]:
        return encodable((yield))


def encodable(report: Any) -> Any:
    """The same with half characters written out: one in the log of a test, and the channel would end the whole run."""
    if isinstance(report, str):
        return report.encode(errors="backslashreplace").decode()
    if isinstance(report, dict):
        return {name: encodable(value) for name, value in report.items()}
    if isinstance(report, list | tuple):
        return type(report)(map(encodable, report))
    return report


class Scheduling(LoadScopeScheduling):
    """Test by test, but those that share costly fixtures together, and what has most tests first.

    Not `--dist loadgroup`: with pytest 9.2 it ignores the groups without a word (pytest-xdist issue 1386).
    """

    def _split_scope(self, nodeid: str) -> str:
        return stays_together(nodeid)

    def _reschedule(self, node: Any) -> None:
        # A worker that replaces a dead one collects first; given tests before, it never runs them.
        if node not in self.registered_collections:
            return
        super()._reschedule(node)
        # A worker begins a test when it knows of the next one, or that there is none: with one alone it waits for ever.
        if not node.shutting_down and self._pending_of(self.assigned_work[node]) == 1:
            super()._reschedule(node)

    def remove_node(self, node: Any) -> str | None:
        """A worker died. Its test has failed and is not run again: it would take the next worker with it."""
        work = self.assigned_work[node]
        died_of = next((nodeid for unit in work.values() for nodeid, done in unit.items() if not done), None)
        for unit in work.values():
            unit.pop(died_of or "", None)
        # A unit without tests would never end, and its worker would get no other.
        self.assigned_work[node] = {scope: unit for scope, unit in work.items() if not all(unit.values())}
        super().remove_node(node)
        return died_of


def stays_together(nodeid: str) -> str:
    """The directory or file whose tests share a fixture wider than a test, else the test by itself.

    Read from the source: the controller knows no more of a test than its name.
    """
    file = nodeid.split("::")[0]
    directory = file.rpartition("/")[0]
    if _has_fixture_of(f"{directory}/conftest.py", "package"):
        return directory
    return file if _has_fixture_of(file, "module") else nodeid


@functools.cache
def _has_fixture_of(file: str, scope: str) -> bool:
    path = REPOSITORY / file
    return path.exists() and f'fixture(scope="{scope}")' in path.read_text()
