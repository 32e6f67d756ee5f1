"""Settings: from the command line, `EO_` environment variables, `.env` and `[tool.eoframework]`; the first wins.

The only module that reads the process environment.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    PyprojectTomlConfigSettingsSource,
    SettingsConfigDict,
)

from eoframework import kafka_keys
from eoframework.errors import ConfigurationError
from eoframework.schema import Schema

PREFIX = "EO_"
_KAFKA_PREFIX = "eo_kafka_"
_DATABASE_URL = re.compile(r"(postgres|postgresql)(\+psycopg|\+psycopg_async)?(://.*)", re.DOTALL)
_PASSWORD = re.compile(r"://[^/?#@]*?:(?P<password>[^/?#]*)@")
_PASSWORD_PARAMETER = re.compile(r"[?&](?:password|sslpassword)=([^&]*)")

CRASH_POINTS = ("EO_CRASH_AT", "EO_FREEZE_AT", "EO_FREEZE_MARK", "EO_CRASH_IN")
"""Where a process kills or stops itself: only for crashtest/armed.py."""

_command_line: dict[str, Any] = {}

Seconds = Annotated[float, Field(gt=0)]


def _seconds(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    return value


class Settings(BaseSettings):
    """Everything that can be set, with the safe value as the default. Times are seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        pyproject_toml_table_header=("tool", "eoframework"),
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: SecretStr | None = Field(default=None, description="postgresql://user:password@host/database")
    database_schema: str = Field(default="eo", description="PostgreSQL schema of eoframework's own tables")
    kafka_bootstrap_servers: str | None = Field(default=None, description="host:port,host:port")
    kafka: dict[str, str] = Field(default_factory=dict, repr=False, description="librdkafka's own settings")
    group_protocol: Literal["consumer", "classic"] = "consumer"

    max_batch: int = Field(default=500, gt=0, description="messages of one database transaction")
    max_wait: Seconds = Field(default=0.5, description="how long a poll waits for the first message")
    max_poll_interval: Seconds = Field(default=300, description="a batch must be done within this time")
    statement_timeout: Seconds = 60
    lock_timeout: Seconds = 30
    idle_in_transaction_timeout: Seconds = Field(
        default=20, description="the longest a handler may go on without touching the database"
    )
    offset_commit_interval: Seconds = 1.0
    on_failure: Literal["stop", "pause"] = Field(
        default="stop", description="what a failing message does to a handler with retry=None"
    )
    failure_text: bool = Field(
        default=True, description="keep an error's message and traceback, which may quote payloads, with what failed"
    )

    processed_retention: Annotated[timedelta, BeforeValidator(_seconds)] = Field(
        default=timedelta(days=7), description="how long a message id is remembered, and so recognised as a duplicate"
    )
    prune_interval: Seconds = 60
    prune_batch: int = Field(default=5000, gt=0)

    relay_batch: int = Field(default=2000, gt=0)
    relay_mode: Literal["transactional", "idempotent"] = "transactional"
    relay_lease: Seconds = 5.0
    relay_after_dead: Literal["continue", "hold"] = Field(
        default="continue", description="what later rows of a key do when Kafka refuses one for good: go on, or wait"
    )
    relay_poll_max: Seconds = 0.1
    transaction_timeout: Seconds = Field(default=60, description="Kafka's transaction.timeout.ms, in seconds")

    transform_batch: int = Field(default=5000, gt=0, description="messages of one Kafka transaction of a transform")
    transform_interval: Seconds = Field(default=0.1, description="after so long it is committed, however many they are")
    transform_transaction_timeout: Seconds = Field(
        default=5, description="Kafka ends a transform's transaction that is open for so long, its worker being dead"
    )
    transform_message_timeout: Seconds = Field(
        default=4, description="a record that Kafka has not confirmed for so long fails its transaction"
    )
    instance: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]{1,100}$",
        description="name of this worker among all of its app, for ids that outlive the process; default a new one",
    )

    log_format: Literal["auto", "text", "json"] = Field(default="auto", description="auto: text on a terminal")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """Read the settings; `overrides` (the command line's) win over everything.

        Raises ConfigurationError, which names every wrong setting and shows no value: it may be a secret.
        """
        try:
            return cls(**{**_command_line, **overrides})
        except ValidationError as error:
            raise ConfigurationError(_describe(error), remedy="Correct the setting named.") from None

    def require_database_url(self) -> str:
        """The database URL, for SQLAlchemy with psycopg 3. Raises ConfigurationError when there is none."""
        if self.database_url is None:
            raise ConfigurationError(
                "no database is configured.",
                remedy="Set EO_DATABASE_URL=postgresql://user:password@host/name, or run under `eo dev run -- ...`.",
            )
        return self.database_url.get_secret_value()

    def require_bootstrap_servers(self) -> str:
        """Kafka's addresses. Raises ConfigurationError when there are none."""
        if not self.kafka_bootstrap_servers:
            raise ConfigurationError(
                "no Kafka cluster is configured.",
                remedy="Set EO_KAFKA_BOOTSTRAP_SERVERS=host:port, or run under `eo dev run -- ...`.",
            )
        return self.kafka_bootstrap_servers

    def secrets(self) -> frozenset[str]:
        """The values that must never be shown, for the log's redaction."""
        found = {value for key, value in self.kafka.items() if key in kafka_keys.SECRET}
        if self.database_url is not None:
            found |= url_secrets(self.database_url.get_secret_value())
        return frozenset(value for value in found if value)

    @field_validator("database_url", mode="before")
    @classmethod
    def _use_psycopg(cls, value: object) -> object:
        url = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not isinstance(url, str):
            return value
        match = _DATABASE_URL.fullmatch(url)
        if match is None:
            raise ValueError("must begin with postgresql:// (psycopg 3 is the driver)")
        return "postgresql" + (match[2] or "+psycopg") + match[3]

    @field_validator("database_schema")
    @classmethod
    def _usable_schema(cls, value: str) -> str:
        return Schema(value).name

    @field_validator("kafka", mode="before")
    @classmethod
    def _canonical_keys(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        return {kafka_keys.canonical(str(key)): _as_librdkafka(item) for key, item in value.items()}

    @model_validator(mode="after")
    def _check(self) -> Settings:
        kafka_keys.check_overrides(self.kafka, group_protocol=self.group_protocol)
        _check_ladder(self)
        if self.processed_retention <= timedelta(0):
            raise ConfigurationError(
                "processed_retention must be above 0.", remedy="Without remembered ids no duplicate is recognised."
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The order of the sources: command line, environment, `.env`, `[tool.eoframework]`."""
        pyproject = _Pyproject(settings_cls)
        return (
            init_settings,
            _KafkaKeys(settings_cls, env_settings, where="the environment"),
            env_settings,
            _KafkaKeys(settings_cls, dotenv_settings, where=".env"),
            dotenv_settings,
            pyproject,
        )


class _Pyproject(PyprojectTomlConfigSettingsSource):
    """`[tool.eoframework]` of the pyproject.toml in the current directory."""

    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        for name in values:
            _refuse_misspelt(name, written=f"[tool.eoframework] {name}", prefix="")
        if isinstance(values.get("kafka"), Mapping):
            values["kafka"] = _flatten(values["kafka"])
        return values


class _KafkaKeys(PydanticBaseSettingsSource):
    """`EO_KAFKA_SESSION_TIMEOUT_MS=6000` as {"session.timeout.ms": "6000"}; also notices misspelt `EO_` names."""

    def __init__(self, settings_cls: type[BaseSettings], source: PydanticBaseSettingsSource, *, where: str) -> None:
        super().__init__(settings_cls)
        self._source = source
        self._where = where

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        assert isinstance(self._source, (EnvSettingsSource, DotEnvSettingsSource))
        found = {}
        for name, value in self._source.env_vars.items():
            lowered = name.lower()
            if lowered == "eo_kafka_bootstrap_servers" or not lowered.startswith(PREFIX.lower()):
                continue
            if lowered.startswith(_KAFKA_PREFIX):
                found[kafka_keys.canonical(lowered.removeprefix(_KAFKA_PREFIX))] = value or ""
            else:
                _refuse_misspelt(lowered.removeprefix("eo_"), written=f"{name.upper()} ({self._where})", prefix=PREFIX)
        return {"kafka": found} if found else {}


def use_command_line(values: Mapping[str, Any]) -> None:
    """Let every later `Settings.load()` of this process begin with these: the program's own App loads its settings too.

    Raises ConfigurationError for a name that is no setting.
    """
    for name in values:
        if name not in Settings.model_fields:
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else "The settings are listed in the documentation."
            raise ConfigurationError(f"there is no setting {name!r}.", remedy=hint)
    _command_line.clear()
    _command_line.update(values)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes`, for a child process."""
    return {**os.environ, **changes}


def replace_environment(values: Mapping[str, str]) -> None:
    """Let this process's environment be these variables: for one that was forked to be another program."""
    os.environ.clear()
    os.environ.update(values)


def take_crash_points() -> dict[str, str]:
    """The variables that say where this process is to kill itself, which are gone then: its children run as ever."""
    return {name: os.environ.pop(name) for name in CRASH_POINTS if name in os.environ}


def refuse_crash_points() -> None:
    """Raises ConfigurationError where one of those variables is set: what was armed has taken them already.

    Ignored, a worker meant to be killed would run on, and a crash test would count a crash that never was.
    """
    found = [name for name in CRASH_POINTS if os.environ.get(name)]
    if found:
        raise ConfigurationError(
            f"{', '.join(found)} set: `eo` kills itself nowhere.",
            remedy="Unset it; or, to test crashes on a throw-away database: python -m eoframework.crashtest.armed ...",
        )


def url_secrets(url: str) -> frozenset[str]:
    """The passwords inside a database URL, as written and as decoded."""
    match = _PASSWORD.search(url)
    found = {match["password"]} if match else set()
    found |= set(_PASSWORD_PARAMETER.findall(url))
    return frozenset(found | {unquote(password) for password in found}) - {"", "***"}


def _check_ladder(settings: Settings) -> None:
    """Each timeout must fire before the one that waits for it, or a successor gives up before its predecessor."""
    rungs = (
        (
            "idle_in_transaction_timeout",
            "lock_timeout",
            "a frozen worker's transaction must end before its successor's claim gives up",
        ),
        ("lock_timeout", "max_poll_interval", "a claim must be decided before the group throws the member out"),
        ("statement_timeout", "max_poll_interval", "a statement must end before the group throws the member out"),
        (
            "lock_timeout",
            "statement_timeout",
            "a claim must be told that it waited for a frozen worker, whose transaction it then ends",
        ),
    )
    for lower, upper, reason in rungs:
        low, high = getattr(settings, lower), getattr(settings, upper)
        if not low < high:
            raise ConfigurationError(
                f"{lower} ({low:g} s) must be below {upper} ({high:g} s): {reason}.",
                remedy=f"Lower EO_{lower.upper()} or raise EO_{upper.upper()}.",
            )


def _refuse_misspelt(name: str, *, written: str, prefix: str) -> None:
    # Only near misses: other programs may use the prefix too, but EO_DATABSE_URL silently ignored means the wrong
    # database, or none.
    fields = Settings.model_fields
    if name in fields:
        return
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
    if near:
        meant = f"{prefix}{near[0].upper()}" if prefix else near[0]
        raise ConfigurationError(f"unknown setting {written}.", remedy=f"Did you mean {meant}?")


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """TOML reads an unquoted `session.timeout.ms = 6000` as nested tables."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[kafka_keys.canonical(prefix + key)] = value
    return flat


def _as_librdkafka(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _describe(error: ValidationError) -> str:
    parts = []
    for problem in error.errors(include_input=False, include_url=False, include_context=False):
        name = PREFIX + "_".join(str(part) for part in problem["loc"]).upper()
        parts.append(f"{name}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts) + "."
