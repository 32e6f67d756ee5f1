"""`eo external`: what is listed, what can be resolved, and what is refused and changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from sqlalchemy import text

from eoframework import External, ExternalCall, Message, NotDone
from eoframework.db.session import Database
from eoframework.external import idempotency_key
from eoframework.settings import Settings, environment
from tests.conftest import REPOSITORY
from tests.consume.harness import column, scalar
from tests.failure.calls import Order, Step, end_lease, handler_with, order
from tests.processes import settings_environment

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def eo(settings: Settings) -> Cli:
    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "eoframework.cli", "external", *arguments],
            cwd=REPOSITORY,
            env=environment(**settings_environment(settings), NO_COLOR="1", COLUMNS="200"),
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


def broken(message: Message[Order], call: ExternalCall) -> object:
    raise TimeoutError("no answer")


def refused(message: Message[Order], call: ExternalCall) -> object:
    raise NotDone("refused")


@pytest.fixture
def step(database: Database) -> Step:
    """One unresolved call, one with a result, one that surely was not made."""
    handler = handler_with(External("charge", broken))
    step = Step(database, handler)
    with pytest.raises(TimeoutError):
        step.prepare(order(1))
    Step(database, handler_with(External("charge", lambda message, call: {"id": 1}))).prepare(order(2, offset=1))
    with pytest.raises(NotDone):
        Step(database, handler_with(External("charge", refused))).prepare(order(3, offset=2))
    return step


def test_ls(eo: Cli, step: Step) -> None:
    (line,) = json.loads(eo("ls", "--json").stdout)
    identity = order(1).id
    assert identity is not None
    assert (line["state"], line["error_class"], line["calls"]) == ("unresolved", "TimeoutError", 1)
    assert line["key"] == idempotency_key("shop.pay", identity, "charge")
    every = json.loads(eo("ls", "--json", "--all").stdout)
    assert [one["state"] for one in every] == ["unresolved", "done", "free"]
    assert every[1]["result"] == {"id": 1}
    page = json.loads(eo("ls", "--json", "--all", "--after", str(every[0]["id"]), "--limit", "1").stdout)
    assert [one["id"] for one in page] == [every[1]["id"]]
    assert len(json.loads(eo("ls", "--json", "--all", "--consumer", "shop.pay").stdout)) == 3
    assert "Did you mean 'shop.pay'" in eo("ls", "--consumer", "shop.pya", code=5).stderr
    assert "knows no consumer 'nobody.here'" in eo("ls", "--json", "--consumer", "nobody.here", code=5).stderr
    assert f"more: --after {every[1]['id']}" in eo("ls", "--all", "--limit", "2").stderr
    assert "more" not in eo("ls", "--all", "--limit", "3").stderr
    shown = eo("ls").stdout
    assert "shop.pay charge orders[0]@0 unresolved: 1 call, ended with TimeoutError" in shown


def test_resolve_with_a_result(eo: Cli, step: Step, database: Database) -> None:
    call = str(scalar(database.engine, "SELECT id FROM eo.external_call WHERE error_class = 'TimeoutError'"))
    assert "its result is stored" in eo("resolve", call, "--result", '{"charge": 9}').stdout
    assert step.prepare(order(1)) == {"charge": {"charge": 9}}
    assert column(database.engine, "SELECT action || ' ' || subject FROM eo.audit") == [
        f"external.resolve external_call/{call}"
    ]
    assert scalar(database.engine, "SELECT detail -> 'result' ->> 'charge' FROM eo.audit") == "9"
    assert "has a result since" in eo("resolve", call, "--not-done", code=70).stderr


def test_resolve_as_not_done(eo: Cli, step: Step, database: Database) -> None:
    call = str(scalar(database.engine, "SELECT id FROM eo.external_call WHERE error_class = 'TimeoutError'"))
    document = json.loads(eo("resolve", call, "--not-done", "--json").stdout)
    assert (document["was"], document["done"]) == ("unresolved", False)
    with pytest.raises(TimeoutError):  # called again, rather than asked about
        step.prepare(order(1))
    assert scalar(database.engine, f"SELECT calls FROM eo.external_call WHERE id = {call}") == 2
    assert scalar(database.engine, "SELECT action FROM eo.audit") == "external.not_done"


def test_a_call_that_may_be_running_is_not_resolved(eo: Cli, step: Step, database: Database) -> None:
    """Seen to fail with the check of `running` removed from db/external_admin.py: it was resolved under the caller."""
    with database.begin("test") as connection:
        connection.execute(text("UPDATE eo.external_call SET lease_until = clock_timestamp() + interval '1 hour'"))
    call = str(scalar(database.engine, "SELECT id FROM eo.external_call WHERE error_class = 'TimeoutError'"))
    assert "may be running" in eo("resolve", call, "--not-done", code=70).stderr
    assert json.loads(eo("ls", "--json").stdout) == []
    end_lease(database)
    eo("resolve", call, "--not-done")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("99999", "--not-done"), 5, "there is no external call 99999"),
        (("1",), 2, "either --result JSON or --not-done"),
        (("1", "--not-done", "--result", "1"), 2, "either --result JSON or --not-done"),
        (("1", "--result", "{"), 2, "is no JSON"),
        (("1", "--result", "NaN"), 2, "is no JSON: NaN"),
    ],
)
def test_bad_commands_change_nothing(
    eo: Cli, step: Step, database: Database, arguments: tuple[str, ...], code: int, says: str
) -> None:
    before = column(database.engine, "SELECT e::text FROM eo.external_call e ORDER BY id")
    assert says in eo("resolve", *arguments, code=code).stderr
    assert column(database.engine, "SELECT e::text FROM eo.external_call e ORDER BY id") == before
    assert scalar(database.engine, "SELECT count(*) FROM eo.audit") == 0
