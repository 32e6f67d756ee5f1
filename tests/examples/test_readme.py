"""The first consumer of the README, word for word but for names that must be unique, processes a message."""

from __future__ import annotations

import re
import sys
import types
import uuid

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from eoframework.db.session import Database
from eoframework.settings import Settings
from tests.conftest import REPOSITORY, MakeTopic
from tests.consume.harness import run_once, scalar
from tests.processes import produce


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    sku: Mapped[str] = mapped_column(primary_key=True)
    free: Mapped[int]


def first_example() -> str:
    found = re.search(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    assert found is not None
    return found[1]


def test_the_first_consumer_of_the_readme(
    settings: Settings, database: Database, make_topic: MakeTopic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EO_DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("EO_KAFKA_BOOTSTRAP_SERVERS", settings.require_bootstrap_servers())
    orders, app_name = make_topic("orders"), f"stock-{uuid.uuid4().hex[:8]}"
    code = first_example().replace('"orders.v1"', repr(orders)).replace('"stock"', repr(app_name))
    assert orders in code
    assert app_name in code
    module = types.ModuleType("readme_example")
    module.__dict__["Item"] = Item
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "README.md", "exec"), module.__dict__)
    Base.metadata.create_all(database.engine)
    with Session(database.engine) as session, session.begin():
        session.add(Item(sku="a", free=10))
    produce(settings.require_bootstrap_servers(), orders, [(b"a", b'{"order_id": 1, "sku": "a", "qty": 3}')] * 2)
    assert run_once(module.__dict__["app"]) == 0
    assert scalar(database.engine, "SELECT free FROM item") == 7, "the same order id twice is one effect"
    assert scalar(database.engine, "SELECT count(*) FROM eo.outbox_message WHERE topic = 'reserved.v1'") == 1
