"""Services and databases for the runs: a template that is copied, marked as a throw-away each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import create_engine, make_url, text

from eoframework.db import migrating, throw_away
from eoframework.db.session import open_database
from eoframework.schema import Schema
from tests.apps.campaign_flow import TABLES
from tests.conftest import Addresses, database_named, mint_outbox
from tests.proxy import Proxy, proxy_to


@contextmanager
def template_database(addresses: Addresses, name: str) -> Iterator[str]:
    """The name of a migrated database with the application's tables, to be copied for each run."""
    with database_named(addresses, name) as url:
        database = open_database(url, Schema())
        migrating.upgrade(database)
        database.engine.dispose()
        engine = create_engine(url)
        with engine.begin() as connection:
            # Copies of it are what somebody who copied a database would have: each is told that it is at home.
            connection.execute(text("UPDATE eo.outbox SET home = NULL"))
            connection.execute(text(TABLES))
        engine.dispose()
        yield name


@contextmanager
def throw_away_database(addresses: Addresses, name: str, *, template: str) -> Iterator[str]:
    """The URL of a copy in which processes may be killed."""
    with database_named(addresses, name, source=template) as url:
        mint_outbox(url)
        database = open_database(url, Schema())
        throw_away.mark_throw_away(database)
        database.engine.dispose()
        yield url


@contextmanager
def proxy_before(url: str) -> Iterator[Proxy]:
    """A proxy to this URL's server."""
    parsed = make_url(url)
    with proxy_to(parsed.host or "127.0.0.1", parsed.port or 5432) as proxy:
        yield proxy


def through(url: str, proxy: Proxy) -> str:
    """The same URL by way of the proxy."""
    return make_url(url).set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
