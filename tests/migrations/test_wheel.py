"""From the built wheel in an empty environment: the version files come along."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from eoframework.db import migrating
from eoframework.settings import environment
from tests.conftest import REPOSITORY, Addresses
from tests.processes import read_topic


@pytest.fixture(scope="module")
def eo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `eo` of a wheel built from this checkout, installed where nothing else is."""
    directory = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", str(directory / "dist"), str(REPOSITORY))
    (wheel,) = (directory / "dist").glob("*.whl")
    # A pip of its own would take four seconds of processor time.
    _run(sys.executable, "-m", "venv", "--without-pip", str(directory / "venv"))
    pip = [sys.executable, "-m", "pip", "--python", str(directory / "venv/bin/python")]
    _run(*pip, "install", "--quiet", str(wheel))
    return directory / "venv/bin/eo"


def test_an_installed_wheel_migrates(eo: Path, empty_url: str, tmp_path: Path) -> None:
    settings = {"EO_DATABASE_URL": empty_url, "EO_DATABASE_SCHEMA": "shop_eo"}

    def run(*arguments: str, code: int = 0) -> str:
        return _run(str(eo), *arguments, code=code, cwd=tmp_path, **settings)

    assert "Run: eo db upgrade" in run("db", "check", code=3)
    assert json.loads(run("db", "upgrade", "--json")) == {"from": None, "to": migrating.head(), "schema": "shop_eo"}
    assert json.loads(run("db", "current", "--json"))["version"] == migrating.head()
    run("db", "check")
    assert 'CREATE TABLE "shop_eo".outbox_message' in run("db", "sql")
    assert "no tables" in run("db", "downgrade", "base")
    run("db", "check", code=3)


def test_every_command_of_an_installed_wheel_loads(eo: Path, tmp_path: Path) -> None:
    """Seen to fail without sqlalchemy's asyncio extra: greenlet was there only through the tools."""
    for command in ("run", "relay", "topics", "publish", "position", "db", "dev"):
        assert "Usage" in _run(str(eo), command, "--help", cwd=tmp_path)


def test_a_strangers_project(eo: Path, empty_url: str, services: Addresses, tmp_path: Path) -> None:
    """The README's example in a directory of its own, with an alembic environment that ours is joined to by package."""
    readme = (REPOSITORY / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", readme, re.S)
    assert found is not None
    suffix = uuid.uuid4().hex[:10]
    example = found[1].replace('"orders.v1"', f'"orders.{suffix}"').replace('"reserved.v1"', f'"reserved.{suffix}"')
    (tmp_path / "models.py").write_text(MODELS)
    example = example.replace('App("stock")', f'App("stock-{suffix}")')
    (tmp_path / "stock.py").write_text(f"from models import Item\n{example}")
    settings = {"EO_DATABASE_URL": empty_url, "EO_KAFKA_BOOTSTRAP_SERVERS": services.bootstrap_servers}

    def run(program: str, *arguments: str, stdin: str = "") -> str:
        return _run(str(eo.parent / program), *arguments, cwd=tmp_path, stdin=stdin, **settings)

    run("alembic", "init", "migrations")
    join(tmp_path, empty_url)
    run("alembic", "upgrade", "heads")
    first = ("--head", "base", "--branch-label", "shop", "--version-path", "migrations/versions")
    run("alembic", "revision", "--autogenerate", "-m", "items", *first)
    run("alembic", "upgrade", "heads")
    (version,) = (tmp_path / "migrations/versions").glob("*_items.py")
    upgrade, _, _ = version.read_text().partition("def downgrade")
    assert "create_table('item'" in upgrade
    assert "drop_" not in upgrade
    run("eo", "db", "check")
    run("eo", "topics", "apply", "stock:app")
    run("python", "-c", "import models; models.fill()")
    run("eo", "publish", "stock:app", f"orders.{suffix}", stdin='{"order_id": 1, "sku": "a", "qty": 2}\n')
    run("eo", "relay", "stock:app", "--once")
    run("eo", "run", "stock:app", "--once")
    run("eo", "relay", "stock:app", "--once")
    assert run("python", "-c", "import models; print(models.free())").strip() == "8"
    sent = read_topic(services.bootstrap_servers, f"reserved.{suffix}")
    assert [json.loads(message.value() or b"") for message in sent] == [{"order_id": 1}]


MODELS = """
import os
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

class Base(DeclarativeBase):
    pass

class Item(Base):
    __tablename__ = "item"
    sku: Mapped[str] = mapped_column(primary_key=True)
    free: Mapped[int]

def fill():
    with Session(create_engine(os.environ["EO_DATABASE_URL"])) as session, session.begin():
        session.add(Item(sku="a", free=10))

def free():
    with Session(create_engine(os.environ["EO_DATABASE_URL"])) as session:
        return session.get_one(Item, "a").free
"""


def join(directory: Path, url: str) -> None:
    """What docs/deploy.md says, done to what `alembic init` made."""
    page = (REPOSITORY / "docs/deploy.md").read_text()
    found = re.search(r"```ini\n# alembic.ini\n(.*?)```", page, re.S)
    assert found is not None
    ini = directory / "alembic.ini"
    lines = [line for line in ini.read_text().splitlines() if not line.startswith(("path_separator", "sqlalchemy.url"))]
    where = lines.index("[alembic]") + 1
    lines[where:where] = [f"sqlalchemy.url = {url.replace('%', '%%')}", *found[1].splitlines()]
    ini.write_text("\n".join(lines))
    env = directory / "migrations/env.py"
    metadata = (
        "from models import Base\nfrom eoframework.alembic_env import include_object\ntarget_metadata = Base.metadata\n"
    )
    code = env.read_text().replace("target_metadata = None\n", metadata)
    before = "connection=connection, target_metadata=target_metadata"
    assert metadata in code
    assert before in code
    env.write_text(code.replace(before, f"{before}, include_schemas=True, include_object=include_object"))


def _run(*command: str, code: int = 0, cwd: Path | None = None, stdin: str = "", **settings: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**settings),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == code, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + (done.stderr if code else "")
