"""A shop of each test's own, on the run's services."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Addresses, database_named
from tests.consume.nursery import Nursery
from tests.restored.rig import Shop


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


@pytest.fixture
def shop(services: Addresses, nursery: Nursery, tmp_path: Path) -> Iterator[Shop]:
    with database_named(services, f"eo_shop_{uuid.uuid4().hex[:10]}") as url:
        made = Shop.made(nursery, url, services.bootstrap_servers, tmp_path)
        yield made
        made.end()
