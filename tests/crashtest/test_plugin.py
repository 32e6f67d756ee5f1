"""The fixture `eo`: handlers run twice on a real database, and one that would do something twice fails its test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import select

from eoframework.errors import NotFound
from eoframework.settings import environment
from eoframework.testing import Eo
from eoframework.testing.plugin_eo import NotExactlyOnce, NotProcessed
from tests.crashtest import bench_shop as shop
from tests.crashtest.bench_shop import Item, Note, Placed, Reserved, orders, refused, reserved, solid


def notes(eo: Eo) -> list[str]:
    with eo.session() as session:
        return list(session.scalars(select(Note.said).order_by(Note.id)))


def test_effects_and_messages_of_a_delivery_are_there_once(eo: Eo) -> None:
    """Seen to fail with the processed id left out of `first_timers`: the second delivery was "not taken for a
    duplicate"."""
    with eo.session() as session:
        session.add(Item(sku="a", free=5))
    eo.deliver(shop.reserve, orders, Placed(order_id=1, sku="a"))
    eo.deliver(shop.reserve, orders, Placed(order_id=2, sku="a"))
    with eo.session() as session:
        assert session.get_one(Item, "a").free == 3
    assert notes(eo) == ["reserved 1", "reserved 2"]
    assert eo.published(reserved) == eo.published(reserved.name) == [Reserved(order_id=1), Reserved(order_id=2)]
    assert eo.dead() == []


def test_each_test_has_a_database_of_its_own(eo: Eo) -> None:
    assert notes(eo) == []


def test_a_message_given_up_fails_the_test_unless_it_is_expected(eo: Eo) -> None:
    with pytest.raises(NotProcessed, match=r"bench.reserve gave the message up after 1 attempt.*no a"):
        eo.deliver(shop.reserve, orders, Placed(order_id=1, sku="a"))
    eo.deliver(shop.reserve, orders, Placed(order_id=2, sku="b"), dead=True)
    assert [(letter.consumer, letter.error) for letter in eo.dead()] == [
        ("bench.reserve", "no a"),
        ("bench.reserve", "no b"),
    ]
    with pytest.raises(NotProcessed, match="was to give the message up, and it was processed"):
        eo.deliver(shop.book, orders, Placed(order_id=3, sku="a"), dead=True)


def test_bytes_are_delivered_as_they_are(eo: Eo) -> None:
    eo.deliver(shop.reserve, orders, b"no order", key="a", dead=True)
    assert "DecodeError" in str(eo.dead()[0].error_class)


def test_retries_are_not_waited_for(eo: Eo) -> None:
    eo.deliver(shop.third_time, orders, Placed(order_id=1, sku="a"))
    assert notes(eo) == ["attempt 3"]
    with pytest.raises(NotProcessed) as raised:
        eo.deliver(shop.never, orders, Placed(order_id=1, sku="a"))
    assert isinstance(raised.value.__cause__, LookupError)


def test_calls_declared_as_external_are_made(eo: Eo) -> None:
    eo.deliver(shop.paid, orders, Placed(order_id=3, sku="a"))
    assert notes(eo) == ["paid 300"]


def test_a_transform_gives_what_it_sends_by_topic(eo: Eo) -> None:
    assert eo.deliver(shop.sort, orders, Placed(order_id=1, sku="a")) == {reserved.name: [Reserved(order_id=1)]}
    assert eo.deliver(shop.sort, orders, Placed(order_id=1, sku="gone")) == {
        refused.name: [Placed(order_id=1, sku="gone")]
    }


def test_an_app_stands_for_all_its_handlers_of_the_topic(eo: Eo) -> None:
    with pytest.raises(NotExactlyOnce, match=r"bench-solid.numbers, called twice for one message, sent something else"):
        eo.deliver(solid, orders, Placed(order_id=4, sku="a"))
    assert notes(eo) == ["booked 4"]
    with pytest.raises(NotFound, match=r"reserve handles bench.orders.v1, not 'bench.reserved.v1'"):
        eo.deliver(shop.reserve, reserved, Reserved(order_id=1))


def test_a_variable_that_a_rollback_does_not_take_back_is_named(eo: Eo) -> None:
    """Seen to fail without the check of variables: both calls did the same, and nothing else told."""
    with pytest.raises(NotExactlyOnce, match=r"remembers something .*bench_shop.COUNT was \d+ and is \d+"):
        eo.deliver(shop.counts, orders, Placed(order_id=1, sku="a"))
    assert notes(eo) == []
    eo.allow(f"{shop.__name__}.COUNT")
    eo.deliver(shop.counts, orders, Placed(order_id=1, sku="a"))


def test_a_second_connection_is_named_with_statement_and_line(eo: Eo) -> None:
    with pytest.raises(NotExactlyOnce) as raised:
        eo.deliver(shop.writes_elsewhere, orders, Placed(order_id=1, sku="a"))
    said = str(raised.value)
    assert "wrote on another connection: \"INSERT INTO bench_note (said) VALUES ('elsewhere')\"" in said
    assert "bench_shop.py:" in said
    assert "bench_note outside its transaction" in said


def test_a_call_is_named_with_address_and_line(eo: Eo) -> None:
    with pytest.raises(NotExactlyOnce, match=r"it called http://127.0.0.1:9/charge at .*bench_shop.py:\d+ inside"):
        eo.deliver(shop.calls_out, orders, Placed(order_id=1, sku="a"))
    eo.allow("http://127.0.0.1:9/charge")
    eo.deliver(shop.calls_out, orders, Placed(order_id=1, sku="a"))


def test_a_handler_that_does_something_else_the_second_time_fails(eo: Eo) -> None:
    with pytest.raises(NotExactlyOnce, match=r"changed other rows when it was called again.*1 written, then nothing"):
        eo.deliver(shop.says_it_once, orders, Placed(order_id=1, sku="a"))


UNUSED = """
import sys

def test_without_it():
    assert not {"sqlalchemy", "confluent_kafka", "pydantic", "psycopg"} & set(sys.modules)
"""
USED = """
import pytest
from sqlalchemy import text
from eoframework import App, Message, Topic, Tx

app, lines = App("lines"), Topic("lines.v1", dict)

@pytest.fixture(scope="session")
def eo_tables():
    def make(engine):
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE line (n int)"))
    return make

@app.handler(lines)
def keep(line: dict, tx: Tx) -> None:
    tx.session.execute(text("INSERT INTO line VALUES (:n)"), line)

def test_on_a_server_of_its_own(eo):
    eo.deliver(keep, lines, {"n": 7})
    with eo.session() as session:
        assert session.scalar(text("SELECT sum(n) FROM line")) == 7
"""


def run_pytest(directory: Path, content: str) -> str:
    """What a pytest of its own says, in a project without any settings of ours."""
    (directory / "test_users.py").write_text(content)
    variables = {name: value for name, value in environment().items() if not name.startswith("EO_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_users.py"],
        cwd=directory,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


def test_unused_the_plugin_imports_nothing(tmp_path: Path) -> None:
    """Seen to fail with `from eoframework.testing.plugin_eo import Eo` at the top of plugin.py."""
    said = run_pytest(tmp_path, UNUSED)
    assert "1 passed" in said, said


def test_without_settings_it_starts_a_server_of_its_own(tmp_path: Path) -> None:
    said = run_pytest(tmp_path, USED)
    assert "1 passed" in said, said
