"""The page about the Producer says what runs."""

from __future__ import annotations

import re
from typing import Any

import pytest

import eoframework
from eoframework import App
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from tests.processes import read_topic
from tests.producer.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "producer.md").read_text()


def test_the_code_of_the_page(kafka: Settings, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(App, "settings", property(lambda _: kafka))
    suffix = re.sub(r"\W", "", str(tmp_path))[-40:]
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    for name in ("orders.v1", "audit.v1"):
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', f'"{name}.{suffix}"')
        Admin(kafka).create(f"{name}.{suffix}", partitions=1, replicas=1, config={})
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "docs/producer.md", "exec"), names)
    names["place"](names["OrderPlaced"](order_id=3, cents=1))
    names["app"].close()
    sent = read_topic(kafka.require_bootstrap_servers(), f"orders.v1.{suffix}")
    assert len(sent) == 1 + 10_000 + 1 + 1 + 1


def test_every_error_of_the_page_is_public() -> None:
    named = set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE))
    assert {"Sent", "EncodeError", "ConfigurationError", "Retryable", "Fenced", "OutcomeUnknown", "NotAllSent"} == named
    assert all(hasattr(eoframework, name) for name in named)
