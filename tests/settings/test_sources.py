"""Where settings come from, which source wins, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from eoframework.errors import ConfigurationError
from eoframework.settings import Settings, use_command_line


@pytest.fixture
def command_line() -> Iterator[None]:
    yield
    use_command_line({})


@pytest.mark.usefixtures("command_line")
def test_the_first_source_wins(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nowhere / "pyproject.toml").write_text(
        "[tool.eoframework]\nmax_batch = 1\nprune_batch = 1\nrelay_batch = 1\nmax_wait = 1\n"
    )
    (nowhere / ".env").write_text("EO_MAX_BATCH=2\nEO_PRUNE_BATCH=2\nEO_RELAY_BATCH=2\n")
    monkeypatch.setenv("EO_MAX_BATCH", "3")
    monkeypatch.setenv("EO_PRUNE_BATCH", "3")
    use_command_line({"max_batch": 4})
    settings = Settings.load()
    assert (settings.max_batch, settings.prune_batch, settings.relay_batch, settings.max_wait) == (4, 3, 2, 1)


def test_kafka_keys_merge_over_the_sources(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nowhere / "pyproject.toml").write_text(
        '[tool.eoframework.kafka]\nlinger.ms = 1\n"queued.min.messages" = 7\nsocket.keepalive.enable = false\n'
    )
    (nowhere / ".env").write_text("EO_KAFKA_LINGER_MS=2\nEO_KAFKA_FETCH_MIN_BYTES=9\n")
    monkeypatch.setenv("EO_KAFKA_LINGER_MS", "3")
    assert Settings.load().kafka == {
        "linger.ms": "3",
        "queued.min.messages": "7",
        "socket.keepalive.enable": "false",
        "fetch.min.bytes": "9",
    }


def test_a_key_with_an_underscore_of_its_own_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EO_KAFKA_LOG_LEVEL", "7")
    assert Settings.load().kafka == {"log_level": "7"}


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_a_postgresql_url_gets_psycopg(scheme: str) -> None:
    settings = Settings.load(database_url=f"{scheme}://u:p@h/d")
    assert settings.require_database_url() == "postgresql+psycopg://u:p@h/d"


@pytest.mark.parametrize(("text", "days"), [("172800", 2), ("P2D", 2), ("2 days", 2)])
def test_the_retention_takes_seconds_and_durations(text: str, days: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EO_PROCESSED_RETENTION", text)
    assert Settings.load().processed_retention == timedelta(days=days)


def test_nothing_is_needed_to_load_but_what_is_missing_is_named() -> None:
    settings = Settings.load()
    with pytest.raises(ConfigurationError, match="EO_DATABASE_URL"):
        settings.require_database_url()
    with pytest.raises(ConfigurationError, match="EO_KAFKA_BOOTSTRAP_SERVERS"):
        settings.require_bootstrap_servers()


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("EO_MAX_BATCH", "many", "EO_MAX_BATCH"),
        ("EO_MAX_BATCH", "0", "EO_MAX_BATCH"),
        ("EO_PRUNE_INTERVAL", "-1", "EO_PRUNE_INTERVAL"),
        ("EO_PROCESSED_RETENTION", "0", "processed_retention"),
        ("EO_GROUP_PROTOCOL", "cooperative", "EO_GROUP_PROTOCOL"),
        ("EO_DATABASE_SCHEMA", 'a"; drop', "schema name"),
        ("EO_DATABASE_URL", "mysql://root:s3cr3t-canary@h/d", "postgresql://"),
        ("EO_DATABSE_URL", "postgresql://h/d", "Did you mean EO_DATABASE_URL"),
        ("EO_KAFKA_SESION_TIMEOUT_MS", "1", "Did you mean .*session.timeout.ms|session.timeout"),
        ("EO_KAFKA_NO_SUCH_THING_AT_ALL", "1", "no setting 'no.such.thing.at.all'"),
    ],
)
def test_a_wrong_setting_is_named(name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=says) as raised:
        Settings.load()
    assert raised.value.exit_code == 3
    assert "s3cr3t-canary" not in f"{raised.value!r} {raised.value.__cause__!r} {raised.value.__context__!r}"


def test_a_misspelt_key_in_pyproject_is_named(nowhere: Path) -> None:
    (nowhere / "pyproject.toml").write_text("[tool.eoframework]\nmax_bacth = 1\n")
    with pytest.raises(ConfigurationError, match="Did you mean max_batch"):
        Settings.load()


@pytest.mark.parametrize(
    ("overrides", "rung"),
    [
        ({"idle_in_transaction_timeout": 30, "lock_timeout": 30}, "idle_in_transaction_timeout .* below lock_timeout"),
        ({"lock_timeout": 300}, "lock_timeout .* below max_poll_interval"),
        ({"statement_timeout": 300}, "statement_timeout .* below max_poll_interval"),
        ({"max_poll_interval": 25}, "lock_timeout .* below max_poll_interval"),
        ({"statement_timeout": 30}, "lock_timeout .* below statement_timeout"),
    ],
)
def test_the_timeout_ladder_names_the_violated_rung(overrides: dict[str, float], rung: str) -> None:
    with pytest.raises(ConfigurationError, match=rung):
        Settings.load(**overrides)


def test_secrets_are_in_no_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EO_DATABASE_URL", "postgresql://user:canary%2Fone@host/d?sslpassword=canary-two")
    monkeypatch.setenv("EO_KAFKA_SASL_PASSWORD", "canary-three")
    settings = Settings.load()
    shown = f"{settings!r} {settings} {settings.model_dump(exclude={'kafka'})}"
    assert "canary" not in shown
    assert settings.secrets() == {"canary%2Fone", "canary/one", "canary-two", "canary-three"}


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load().max_batch = 1  # type: ignore[misc]


def test_an_unknown_name_on_the_command_line_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=re.escape("Did you mean max_batch?")):
        use_command_line({"max_bach": 1})
