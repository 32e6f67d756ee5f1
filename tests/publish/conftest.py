"""An app, a user's own table and a look into the outbox."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy import Engine, String, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from eoframework import App, Topic
from eoframework.db.session import Database
from eoframework.settings import Settings

Published = Callable[[], list[int]]
Names = Callable[[], list[str]]

events: Topic[dict[str, object]] = Topic("events", dict[str, object], key="k")


class Base(DeclarativeBase):
    """The user's own tables."""


class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String, unique=True)


@pytest.fixture
def engine(database: Database) -> Engine:
    """The engine, with the user's table in its database."""
    Base.metadata.create_all(database.engine)
    return database.engine


@pytest.fixture
def app(engine: Engine, settings: Settings) -> App:
    return App("shop", engine=engine, settings=settings)


@pytest.fixture
def published(engine: Engine) -> Published:
    """The `n` of all outbox rows, in the order the relay will take them."""

    def read() -> list[int]:
        with engine.connect() as connection:
            query = "SELECT convert_from(payload, 'UTF8')::json ->> 'n' FROM eo.outbox_message ORDER BY seq"
            return [int(n) for n in connection.execute(text(query)).scalars()]

    return read


@pytest.fixture
def items(engine: Engine) -> Names:
    """The names of all items."""

    def read() -> list[str]:
        with engine.connect() as connection:
            return list(connection.execute(text("SELECT name FROM item ORDER BY id")).scalars())

    return read


def event(n: int, key: str = "a") -> dict[str, object]:
    return {"n": n, "k": key}
