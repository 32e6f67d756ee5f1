"""The connection breaks at COMMIT: the client's error is the same whether it happened or not; the row tells."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from pydantic import BaseModel
from sqlalchemy import make_url, text

from eoframework import App, Message, Topic, Tx, events
from eoframework.db.session import Database, open_database
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.conftest import make_settings
from tests.consume.harness import column, make_app, make_ledger, next_offsets, run_once
from tests.processes import produce
from tests.proxy import Moment, Proxy, proxy_to

INSERT = text('INSERT INTO ledger (partition, "offset", note) VALUES (:p, :o, :n)')


class Entry(BaseModel):
    n: int


@pytest.fixture
def proxy(database_url: str) -> Iterator[Proxy]:
    url = make_url(database_url)
    assert url.host is not None
    with proxy_to(url.host, url.port or 5432) as started:
        yield started


@pytest.mark.parametrize(("moment", "told"), [("before", "had not happened"), ("after", "had happened")])
def test_effects_once_when_the_connection_breaks_at_commit(
    moment: Moment,
    told: str,
    settings: Settings,
    database: Database,
    proxy: Proxy,
    topic_name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Seen to fail with `p.next_offset = f.expected` taken out of `_ADVANCE` and Ownership._renew believing what was
    known before the doubt: the batch was booked twice when its COMMIT had happened. Believing that the COMMIT had
    happened instead: the batch was lost when it had not.
    """
    make_ledger(database.engine)
    produce(settings.require_bootstrap_servers(), topic_name, [(None, b'{"n": %d}' % n) for n in range(30)])
    app = _app_through(proxy, database, settings, topic_name)
    batches = 0

    def cut_the_second(name: str, _fields: dict[str, object]) -> None:
        nonlocal batches
        if name == "consume.handled":
            batches += 1
            if batches == 2:
                proxy.arm(moment)

    unsubscribe = events.subscribe(cut_the_second)
    try:
        with caplog.at_level(logging.WARNING):
            assert run_once(app) == 0
    finally:
        unsubscribe()
        app.database.engine.dispose()
    assert proxy.cuts == 1
    assert f"the last COMMIT {told}" in caplog.text
    assert column(database.engine, 'SELECT "offset" FROM ledger ORDER BY id') == list(range(30))
    assert next_offsets(database) == [(0, 30)]


def _app_through(proxy: Proxy, database: Database, settings: Settings, topic: str) -> App:
    url = database.engine.url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
    through = open_database(url, Schema())
    app = make_app(make_settings(url, settings.require_bootstrap_servers(), max_batch=7), through)

    @app.handler(Topic(topic, Entry), name="book")
    def book(message: Message[Entry], tx: Tx) -> None:
        tx.session.execute(INSERT, {"p": message.partition, "o": message.offset, "n": str(message.payload.n)})

    return app
