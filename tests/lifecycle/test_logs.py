"""Secrets are shown nowhere; lines have the form that suits their reader."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from eoframework import logs
from eoframework.settings import Settings

CANARIES = ("canary-database-pw", "canary-sasl-pw", "pw7")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, known = root.handlers[:], root.level, set(logs._secrets)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logs._secrets.clear()
    logs._secrets.update(known)


def configure(log_format: str) -> None:
    settings = Settings.load(
        database_url=f"postgresql://eo:{CANARIES[0]}@localhost/eo",
        kafka={"sasl.password": CANARIES[1], "ssl.key.password": CANARIES[2]},
        log_format=log_format,
    )
    logs.configure(settings)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_canary_in_any_line(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format)
    log = logging.getLogger("eoframework.test")
    for canary in CANARIES:
        log.info("plain %s", canary)
        log.info("in fields", extra={"given": f"x {canary} y", "more": {"nested": canary}})
        try:
            raise ValueError(f"cannot use {canary}")
        except ValueError:
            log.exception("with a traceback of %r", {"password": canary})
    written = capsys.readouterr().err
    assert written.count("***") >= 3 * len(CANARIES)
    assert not [canary for canary in CANARIES if canary in written]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://u:p@h/d failed", "postgresql://u:***@h/d failed"),
        ("sasl.password=abc def", "sasl.password=*** def"),
        ("{'sasl.password': 'a b', 'x': 1}", "{'sasl.password': ***, 'x': 1}"),
        ("?sslpassword=abc&x=1", "?sslpassword=***&x=1"),
        ("client.secret: abc", "client.secret: ***"),
        ("a word about passwords in general", "a word about passwords in general"),
        ("http://host/path?a=b:c@d", "http://host/path?a=b:c@d"),
    ],
)
def test_what_looks_like_a_secret_is_hidden_even_when_unknown(text: str, shown: str) -> None:
    assert logs.redact(text) == shown


def test_a_short_secret_does_not_eat_words() -> None:
    logs.hide({"eo"})
    assert logs.redact("eo said: video of eoframework") == "*** said: video of eoframework"


def test_json_lines_carry_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json")
    logging.getLogger("eoframework.test").warning("moved %d", 3, extra={"partition": 7, "topic": "t"})
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["message"], line["partition"], line["topic"]) == ("warning", "moved 3", 7, "t")
    assert line["time"].endswith("+00:00")


def test_auto_is_json_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    configure("auto")
    logging.getLogger("eoframework.test").warning("x")
    assert json.loads(capsys.readouterr().err)["message"] == "x"
