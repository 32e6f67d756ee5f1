"""One clear line, the right exit code, and no secret in either."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from sqlalchemy import make_url, text

from tests.cli.conftest import APP, Shell
from tests.processes import eventually

CANARY = "canary-in-the-password"


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("tests.cli.shop", "Write module:attribute"),
        ("tests.cli.shopp:app", "there is no module 'tests.cli.shopp'"),
        ("no_such_module_at_all:app", "there is no module 'no_such_module_at_all'"),
        ("tests.cli.shop:ap", "Did you mean 'app'?"),
        ("tests.cli.shop:not_an_app", "is a object, not an App"),
        ("tests.cli.shop:empty", "has no handlers"),
    ],
)
def test_an_app_that_cannot_be_loaded(bare_shell: Shell, reference: str, says: str) -> None:
    assert says in bare_shell.run("run", reference, code=3).stderr


def test_an_error_inside_the_module_is_shown_with_its_traceback(bare_shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import json_of_the_future\n")
    said = bare_shell.run("run", "broken:app", code=1, cwd=tmp_path).stderr
    assert "Traceback" in said
    assert "json_of_the_future" in said
    (tmp_path / "typo.py").write_text("app = (\n")
    assert "typo.py:1" in bare_shell.run("run", "typo:app", code=3, cwd=tmp_path).stderr


def test_a_handler_that_is_not_there(bare_shell: Shell) -> None:
    assert "Did you mean 'book'?" in bare_shell.run("run", APP, "--handler", "boook", code=5).stderr


@pytest.mark.parametrize("command", ["upgrade", "downgrade", "sql"])
def test_an_app_where_a_version_belongs(bare_shell: Shell, command: str) -> None:
    said = " ".join(bare_shell.run("db", command, APP, code=2).stderr.replace("│", " ").split())
    assert f"{APP!r} is no version" in said
    assert "Leave it out for the newest, or give one of eo0001, eo0002" in said


def test_missing_topics_name_the_command(bare_shell: Shell) -> None:
    said = bare_shell.run("run", APP, code=3).stderr
    assert bare_shell.orders in said
    assert f"Run: eo topics apply {APP}" in said


@pytest.mark.parametrize(
    ("version", "says"), [(None, "Run: eo db upgrade"), ("eo9999", "pip install --upgrade eoframework")]
)
@pytest.mark.parametrize("command", ["run", "relay"])
def test_a_schema_of_another_version(shell: Shell, command: str, version: str | None, says: str) -> None:
    with shell.database.begin("test") as connection:
        connection.execute(text("DELETE FROM eo.alembic_version"))
        if version is not None:
            connection.execute(text("INSERT INTO eo.alembic_version VALUES (:v)"), {"v": version})
    assert says in shell.run(command, APP, code=3).stderr


@pytest.mark.parametrize(("part", "value"), [("password", CANARY), ("database", "no_such_database")])
def test_a_refused_login_is_not_waited_for(bare_shell: Shell, part: str, value: str) -> None:
    """Seen to fail with the pattern of refusals removed from db/readiness.py: it waits for ever."""
    url = make_url(bare_shell.settings.require_database_url()).set(**{part: value})
    done = bare_shell.run("run", APP, code=3, EO_DATABASE_URL=url.render_as_string(hide_password=False))
    assert "refuses the login" in done.stderr
    assert CANARY not in done.stderr + done.stdout


def test_no_secret_of_a_failed_connection_is_shown(bare_shell: Shell) -> None:
    done = bare_shell.run(
        "run",
        APP,
        "--no-wait",
        code=69,
        EO_DATABASE_URL=f"postgresql://eo:{CANARY}@127.0.0.1:1/eo",
        EO_KAFKA_SASL_PASSWORD=CANARY,
        EO_LOG_LEVEL="debug",
    )
    assert "cannot be reached" in done.stderr
    assert CANARY not in done.stderr + done.stdout


def test_no_secret_of_an_unexpected_error_is_shown(bare_shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text("import os\nraise RuntimeError(os.environ['EO_DATABASE_URL'])\n")
    done = bare_shell.run(
        "run", "leaky:app", code=1, cwd=tmp_path, EO_DATABASE_URL=f"postgresql://eo:{CANARY}@127.0.0.1:1/eo"
    )
    assert "RuntimeError: postgresql://eo:***@127.0.0.1:1/eo" in done.stderr
    assert CANARY not in done.stderr + done.stdout


def test_a_kafka_that_is_down_exits_with_69(bare_shell: Shell) -> None:
    done = bare_shell.run("run", APP, "--no-wait", code=69, EO_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert "Kafka at 127.0.0.1:1 cannot be reached" in done.stderr


def test_a_kafka_login_that_is_refused_is_not_waited_for(bare_shell: Shell) -> None:
    """The broker has no SASL, so it refuses any. Seen to fail with the error callback taken out of kafka/admin.py."""
    done = bare_shell.run(
        "run",
        APP,
        code=3,
        EO_KAFKA_SECURITY_PROTOCOL="SASL_PLAINTEXT",
        EO_KAFKA_SASL_MECHANISM="PLAIN",
        EO_KAFKA_SASL_USERNAME="eo",
        EO_KAFKA_SASL_PASSWORD=CANARY,
    )
    assert "refuses the login" in done.stderr
    assert CANARY not in done.stderr + done.stdout


def test_services_that_are_down_are_waited_for_and_the_wait_can_be_ended(bare_shell: Shell) -> None:
    for changes in (
        {"EO_DATABASE_URL": "postgresql://eo:x@127.0.0.1:1/eo"},
        {"EO_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"},
    ):
        process = bare_shell.start("run", APP, **changes)
        eventually(lambda p=process: "waiting for it" in p.output(), "it says that it waits", log=process.log)
        assert process.running()
        process.signal(signal.SIGTERM)
        assert process.wait() == 0


def test_settings_that_are_wrong(bare_shell: Shell) -> None:
    done = bare_shell.run("run", APP, code=3, EO_KAFKA_ACKS="1")
    assert "acks cannot be overridden" in done.stderr
    done = bare_shell.run("run", APP, "--set", "lock_timeout=1", code=3)
    assert "idle_in_transaction_timeout" in done.stderr
    done = bare_shell.run("run", APP, "--set", "max_bach=1", code=3)
    assert "Did you mean max_batch?" in done.stderr
    done = bare_shell.run("db", "check", EO_DATABASE_URL="", EO_DATABASE_SCHEMA="eo", code=3)
    assert "EO_DATABASE_URL" in done.stderr
