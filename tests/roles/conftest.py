"""Four roles on the real server, a database whose tables belong to one of them, and `eo` as each of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from eoframework.db.session import Database, open_database
from eoframework.schema import Schema
from tests.cli.conftest import Shell
from tests.conftest import Addresses, database_named, make_settings, mint_outbox
from tests.consume.nursery import Nursery

NAMES = ("owner", "app", "relay", "observer")


@dataclass(frozen=True)
class Roles:
    """Role names by purpose; the password is pw_<name>."""

    owner: str
    app: str
    relay: str
    observer: str

    def url(self, url: str, purpose: str) -> str:
        name = getattr(self, purpose)
        return make_url(url).set(username=name, password=f"pw_{name}").render_as_string(hide_password=False)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with Nursery() as started:
        yield started


@pytest.fixture(scope="module")
def roles(services: Addresses) -> Iterator[Roles]:
    suffix = uuid.uuid4().hex[:8]
    found = Roles(**{name: f"eo_{name}_{suffix}" for name in NAMES})
    server = create_engine(services.database_url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        for name in NAMES:
            role = getattr(found, name)
            connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'pw_{role}'"))
    yield found
    with server.connect() as connection:
        for name in NAMES:
            connection.execute(text(f"DROP ROLE {getattr(found, name)}"))
    server.dispose()


@pytest.fixture(scope="module")
def bare_url(services: Addresses, roles: Roles) -> Iterator[str]:
    """An empty database in which PUBLIC may do nothing, as its superuser."""
    with database_named(services, f"eo_roles_{uuid.uuid4().hex[:10]}") as url:
        engine = create_engine(url)
        name = make_url(url).database
        with engine.begin() as connection:
            connection.execute(text(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC"))
            for purpose in NAMES:
                connection.execute(text(f"GRANT CONNECT ON DATABASE {name} TO {getattr(roles, purpose)}"))
            connection.execute(text(f"GRANT TEMPORARY ON DATABASE {name} TO {roles.app}"))
            connection.execute(text("CREATE TABLE booking (id int, pid int)"))
            connection.execute(text("CREATE TABLE confirmation (id int)"))
            connection.execute(text(f"GRANT SELECT, INSERT ON booking, confirmation TO {roles.app}"))
        engine.dispose()
        yield url


@pytest.fixture(scope="module")
def url(bare_url: str, roles: Roles, services: Addresses, nursery: Nursery, tmp_path_factory: object) -> str:
    """That database after what docs/deploy.md says: the superuser gives the schema away, its owner does the rest."""
    assert isinstance(tmp_path_factory, pytest.TempPathFactory)
    superuser = shell_for(nursery, services, bare_url, tmp_path_factory.mktemp("deploy"))
    superuser.run("db", "grants", "--owner", roles.owner, "--apply")
    owner = shell_for(nursery, services, roles.url(bare_url, "owner"), superuser.directory)
    owner.run("db", "upgrade")
    others = [word for purpose in NAMES[1:] for word in (f"--{purpose}", getattr(roles, purpose))]
    owner.run("db", "grants", *others, "--apply")
    mint_outbox(bare_url)
    return bare_url


@pytest.fixture
def granted(url: str) -> Iterator[Database]:
    """As superuser."""
    opened = open_database(url, Schema())
    yield opened
    opened.engine.dispose()


@pytest.fixture
def superuser(nursery: Nursery, services: Addresses, url: str, tmp_path: Path) -> Iterator[Shell]:
    shell = shell_for(nursery, services, url, tmp_path)
    yield shell
    for process in shell.processes:
        process.kill()
    shell.database.engine.dispose()


def shell_for(nursery: Nursery, services: Addresses, url: str, directory: Path) -> Shell:
    settings = make_settings(url, services.bootstrap_servers)
    return Shell(nursery, open_database(url, Schema()), settings, uuid.uuid4().hex[:10], directory)


def logged_in(shell: Shell, roles: Roles, purpose: str) -> Shell:
    """The same shell, whose commands log in as that role."""
    url = roles.url(shell.settings.require_database_url(), purpose)
    servers = shell.settings.require_bootstrap_servers()
    return replace(shell, settings=make_settings(url, servers))
