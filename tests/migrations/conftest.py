"""A database with nothing in it, and version files with one version more."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eoframework.db import migrating
from eoframework.db.session import Database, open_database
from eoframework.schema import Schema
from tests.conftest import REPOSITORY, Addresses, database_named

AddVersion = Callable[[str], None]


@pytest.fixture
def empty_url(services: Addresses) -> Iterator[str]:
    with database_named(services, f"eo_empty_{uuid.uuid4().hex[:12]}") as url:
        yield url


@pytest.fixture
def empty(empty_url: str) -> Iterator[Database]:
    opened = open_database(empty_url, Schema())
    yield opened
    opened.engine.dispose()


@pytest.fixture
def add_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AddVersion:
    """Make this code one that knows a version `eo0005` with the given upgrade."""

    def add(upgrade: str) -> None:
        directory = tmp_path / "migrations"
        shutil.copytree(REPOSITORY / "migrations", directory)
        (directory / "versions" / "0004_next.py").write_text(
            "from alembic import op\n"
            "revision = 'eo0005'\ndown_revision = 'eo0004'\nbranch_labels = None\ndepends_on = None\n"
            f"def upgrade():\n    {upgrade}\n"
            "def downgrade():\n    pass\n"
        )
        monkeypatch.setattr(migrating, "location", lambda: directory)

    return add
