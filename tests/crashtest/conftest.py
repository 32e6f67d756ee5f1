"""The plugin's databases on the run's server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eoframework.testing import TestDatabases
from tests.conftest import Addresses
from tests.crashtest.bench_shop import Base


@pytest.fixture(scope="session")
def eo_databases(services: Addresses) -> Iterator[TestDatabases]:
    with TestDatabases(Base.metadata, url=services.database_url) as databases:
        yield databases
