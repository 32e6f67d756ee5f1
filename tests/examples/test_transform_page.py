"""The program of docs/transform.md, word for word but for names that must be unique, on the real broker."""

from __future__ import annotations

import json
import re
import sys
import threading
import types
import uuid
from typing import Any

import pytest

from eoframework import App, lifecycle
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from eoframework.transform.worker import TransformWorker
from tests.conftest import REPOSITORY
from tests.processes import produce, read_topic

TOPICS = ("orders", "picks", "refusals", "parcels", "stages", "open", "history")
NAMES = re.compile(rf'Topic\("({"|".join(TOPICS)})\.v1"')


class Page:
    """The page's program, loaded; its topics exist."""

    def __init__(self, settings: Settings, module: types.ModuleType) -> None:
        self._mark = uuid.uuid4().hex[:8]
        self._settings = settings
        self._servers = settings.require_bootstrap_servers()
        text = (REPOSITORY / "docs" / "transform.md").read_text()
        code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
        assert set(NAMES.findall(code)) == set(TOPICS)
        code = NAMES.sub(lambda found: f"Topic({self.topic(found[1])!r}", code)
        code = code.replace('App("warehouse")', f'App("warehouse-{self._mark}")')
        exec(compile(code, "docs/transform.md", "exec"), module.__dict__)
        self.app: App = module.__dict__["app"]
        assert self._mark in self.app.name
        admin = Admin(settings)
        letters = [str(transform.dead_letter_topic) for transform in self.app.transforms]
        for name in [*map(self.topic, TOPICS), *letters]:
            admin.create(name, partitions=1, replicas=1, config={})

    def topic(self, name: str) -> str:
        return f"{name}.{self._mark}"

    def send(self, topic: str, *payloads: dict[str, Any]) -> None:
        produce(self._servers, self.topic(topic), [(b"k", json.dumps(payload).encode()) for payload in payloads])

    def run(self) -> None:
        stop, admin = threading.Event(), Admin(self._settings)
        workers = [
            TransformWorker(transform, app=self.app, settings=self._settings, admin=admin, stop=stop, once=True)
            for transform in self.app.transforms
        ]
        assert lifecycle.run(workers, stop=stop, once=True) == 0

    def read(self, topic: str) -> list[tuple[bytes | None, Any]]:
        found = read_topic(self._servers, self.topic(topic))
        return [(message.key(), json.loads(value) if (value := message.value()) else None) for message in found]


@pytest.fixture
def page(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Page:
    monkeypatch.setenv("EO_DATABASE_URL", settings.require_database_url())
    monkeypatch.setenv("EO_KAFKA_BOOTSTRAP_SERVERS", settings.require_bootstrap_servers())
    module = types.ModuleType("transform_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Page(settings, module)


def test_the_page_does_what_it_says(page: Page) -> None:
    bolts, nothing = {"order_id": 1, "sku": "bolt", "qty": 2}, {"order_id": 2, "sku": "saw", "qty": 0}
    page.send("orders", bolts, nothing, bolts)
    packed, delivered = {"order_id": 1, "stage": "packed"}, {"order_id": 1, "stage": "delivered"}
    page.send("stages", packed, delivered)
    page.run()
    # A duplicate of the producer counts, as the page says.
    assert page.read("picks") == [(b"bolt", {"order_id": 1, "sku": "bolt"})] * 4
    assert page.read("refusals") == [(b"2", {"order_id": 2, "why": "nothing to pick"})]
    # A topic without a key=: the input's key.
    assert page.read("parcels") == [(b"k", {"order_id": 1, "grams": 10})] * 2
    assert page.read("open") == [(b"1", packed), (b"1", None)]
    assert page.read("history") == [(b"1", packed), (b"1", delivered)]
