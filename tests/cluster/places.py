"""Databases beside the three brokers."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from eoframework.db import migrating
from eoframework.db.session import open_database
from eoframework.schema import Schema
from tests.cluster.brokers import Brokers
from tests.conftest import Addresses, database_named


@contextmanager
def migrated_database(brokers: Brokers) -> Iterator[str]:
    """The URL of a fresh database on the server beside the three brokers, for as long as the block lasts."""
    addresses = Addresses(brokers.services.database_url, brokers.bootstrap_servers)
    with database_named(addresses, f"eo_{uuid.uuid4().hex[:10]}") as url:
        database = open_database(url, Schema())
        migrating.upgrade(database)
        database.engine.dispose()
        yield url
