"""The program of docs/effects.md, word for word but for names that must be unique, against real services.

Each handler gets its messages a second time under another id, and out of order: what the page says must be so.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import types
import uuid
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import text

from eoframework import App, NotDone
from eoframework.db.session import Database
from eoframework.handlers import Handler
from eoframework.message import Record
from eoframework.settings import Settings
from tests.conftest import REPOSITORY, MakeTopic
from tests.consume.harness import Run, column, worker_of
from tests.failure.calls import Step, run_handler
from tests.failure.till import Till
from tests.processes import eventually, produce

TOPICS = ("orders", "invoices", "prices", "moves", "steps", "notices")


@dataclass
class Page:
    """The page's program, loaded; its topics exist and its tables are empty."""

    module: types.ModuleType
    database: Database
    servers: str
    topics: dict[str, str]

    @property
    def app(self) -> App:
        return self.module.__dict__["app"]  # type: ignore[no-any-return]

    def handler(self, name: str) -> Handler:
        return next(handler for handler in self.app.handlers if handler.name == name)

    def send(self, topic: str, *payloads: dict[str, Any]) -> None:
        """Each under an id of its own: for the framework no two of them are the same message."""
        messages = [
            (b"k", json.dumps(payload).encode(), [("message-id", str(uuid.uuid4()).encode())]) for payload in payloads
        ]
        produce(self.servers, self.topics[topic], messages)

    def run(self, name: str, topic: str, *payloads: dict[str, Any]) -> None:
        """Send them and have the handler process them all, retries included."""
        self.send(topic, *payloads)
        done = f"SELECT coalesce(sum(next_offset), 0) FROM eo.position WHERE topic = '{self.topics[topic]}'"
        run = Run([worker_of(self.app, self.handler(name))], threading.Event(), once=False)
        try:
            eventually(
                lambda: self.rows(done) == [len(payloads)] and not self.rows("SELECT 1 FROM eo.parked_message"),
                f"{name} is through",
            )
        finally:
            run.end()
        assert self.rows("SELECT cause FROM eo.dead_letter") == []

    def rows(self, statement: str) -> list[Any]:
        return column(self.database.engine, statement)

    def published(self, topic: str) -> list[Any]:
        rows = self.rows(
            f"SELECT convert_from(payload, 'UTF8') FROM eo.outbox_message WHERE topic = '{self.topics[topic]}'"
        )
        return [json.loads(row) for row in rows]


@pytest.fixture
def page(settings: Settings, database: Database, make_topic: MakeTopic, monkeypatch: pytest.MonkeyPatch) -> Page:
    monkeypatch.setenv("EO_DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("EO_KAFKA_BOOTSTRAP_SERVERS", settings.require_bootstrap_servers())
    code = "\n".join(re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "effects.md").read_text(), re.S))
    topics = {name: make_topic(name) for name in TOPICS}
    for name, unique in topics.items():
        assert f'"{name}.v1"' in code
        code = code.replace(f'"{name}.v1"', repr(unique))
    code = code.replace('App("effects")', f"App({'effects-' + uuid.uuid4().hex[:8]!r})")
    module = types.ModuleType("effects_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(code, "docs/effects.md", "exec"), module.__dict__)
    module.__dict__["Base"].metadata.create_all(database.engine)
    return Page(module, database, settings.require_bootstrap_servers(), topics)


def test_unique_business_key(page: Page) -> None:
    """Seen to fail without ON CONFLICT (the duplicate failed for ever), and without `if created` (published twice)."""
    first, second = {"order_id": 1, "cents": 5}, {"order_id": 2, "cents": 7}
    page.run("bill", "orders", first, second, first, {**first, "cents": 999})
    assert page.rows("SELECT order_id || ':' || cents FROM invoice ORDER BY 1") == ["1:5", "2:7"]
    assert page.published("invoices") == [{"order_id": 1}, {"order_id": 2}]


def test_version_in_the_message(page: Page) -> None:
    """Seen to fail with `where=` removed: the stale price came back."""

    def price(version: int) -> dict[str, Any]:
        return {"sku": "a", "cents": version * 100, "version": version}

    page.run("reprice", "prices", price(1), price(3), price(2), price(3), price(1))
    assert page.rows("SELECT cents || ':' || version FROM price") == ["300:3"]


def test_upsert_by_primary_key(page: Page) -> None:
    """Twice in a row is once; and the last one wins, whichever it is, as the page warns."""
    oslo, rome = {"customer_id": 1, "city": "Oslo"}, {"customer_id": 1, "city": "Rome"}
    page.run("move", "moves", oslo, oslo, rome, rome)
    assert page.rows("SELECT city FROM address") == ["Rome"]


def test_state_machine_guard(page: Page) -> None:
    """Shipped comes before paid, and each of them twice: one transition each, in the order of the states.

    Seen to fail without `Order.status == before` (two notices each), without RetryLater (never shipped), and with
    ordering="key" (the early one died waiting for the one behind it).
    """
    with page.database.begin("test") as connection:
        connection.execute(text("INSERT INTO \"order\" VALUES (1, 'placed')"))
    paid, shipped = {"order_id": 1, "status": "paid"}, {"order_id": 1, "status": "shipped"}
    page.run("advance", "steps", shipped, shipped, paid, paid)
    assert page.rows('SELECT status FROM "order"') == ["shipped"]
    assert page.published("notices") == [paid, shipped]


class TestTheGuard:
    def record(self, page: Page, cents: int = 5) -> Any:
        topic = page.module.__dict__["orders"]
        value = b'{"order_id": 1, "cents": %d}' % cents
        return topic.decode(
            Record(topic.name, 0, 0, None, value, (("message-id", uuid.uuid4().bytes.hex().encode()),), 0)
        )

    def test_pay_twice_is_one_charge(self, page: Page) -> None:
        message, step = self.record(page), Step(page.database, page.handler("pay"))
        with Till() as till:
            page.module.__dict__["PAYMENTS"] = till.url
            run_handler(page.database, step, message)
            run_handler(page.database, step, message)
            assert len(till.log()) == 1
        assert page.rows("SELECT charge FROM payment") == [1]

    def test_declined_is_a_result(self, page: Page) -> None:
        message, step = self.record(page, cents=0), Step(page.database, page.handler("pay"))
        with Till() as till:
            page.module.__dict__["PAYMENTS"] = till.url
            run_handler(page.database, step, message)
        run_handler(page.database, step, message)  # the till is gone: nobody is asked
        assert page.rows("SELECT charge FROM payment") == [None]

    def test_nobody_there_is_not_done(self, page: Page) -> None:
        message, step = self.record(page), Step(page.database, page.handler("pay"))
        with Till() as till:
            page.module.__dict__["PAYMENTS"] = till.url
        with pytest.raises(NotDone):
            step.prepare(message)
        assert page.rows("SELECT 1 FROM eo.external_call WHERE owner IS NULL") == [1]
