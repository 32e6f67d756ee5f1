"""The pytest plugin: `eo` runs handlers on a real database, `eo_crash` kills a real process at each point of its flow.

    def test_an_order_takes_stock(eo):
        with eo.session() as session:
            session.add(Item(sku="a", free=5))
        eo.deliver(app, orders, OrderPlaced(order_id=1, sku="a", qty=2))
        assert eo.published(reserved) == [StockReserved(order_id=1)]

Loaded by pytest in every project of the environment: it imports nothing but pytest until one of the fixtures is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from eoframework import testing

if TYPE_CHECKING:
    from eoframework.testing.plugin_crash import CrashTests
    from eoframework.testing.plugin_database import Tables, TestDatabases
    from eoframework.testing.plugin_eo import Eo


@pytest.fixture(scope="session")
def eo_tables() -> Tables:
    """Your own tables; override it in conftest.py. MetaData (`return Base.metadata`), or a function of an Engine.

    Made once a session; each test gets a copy.
    """
    return None


@pytest.fixture(scope="session")
def eo_databases(eo_tables: Tables) -> Iterator[TestDatabases]:
    """Databases to test on: on the server of EO_DATABASE_URL, else on one that is started for the session."""
    with testing.TestDatabases(eo_tables) as databases:
        yield databases


@pytest.fixture
def eo(eo_databases: TestDatabases, monkeypatch: pytest.MonkeyPatch) -> Iterator[Eo]:
    """Handlers and transforms on a fresh, migrated database of this test's own; see testing.Eo."""
    with eo_databases.fresh() as url:
        # Whatever asks for the settings' database from now on gets the test's.
        monkeypatch.setenv("EO_DATABASE_URL", url)
        with testing.Eo(url, schema=eo_databases.schema) as eo:
            yield eo


@pytest.fixture(scope="session")
def eo_crash() -> Iterator[CrashTests]:
    """`eo_crash("shop.app:app", (topic, payload), ...)`: the app's own processes, killed and started again.

    Starts a Kafka broker and a PostgreSQL server of its own, for the session; see testing.CrashTests.
    """
    with testing.CrashTests() as crashes:
        yield crashes
