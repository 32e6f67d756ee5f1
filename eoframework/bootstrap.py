"""From `module:app` to workers that may start: loaded, reachable, the right schema, the right topics, enough rights."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import sys
import threading
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType

from eoframework import logs
from eoframework.app import App
from eoframework.consume.worker import ConsumeWorker
from eoframework.db import migrating, readiness
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, EoError, NotFound
from eoframework.handlers import Handler
from eoframework.kafka.admin import Admin, UnknownTopic
from eoframework.lifecycle import Worker
from eoframework.prune import PruneWorker
from eoframework.relay import RelayWorker
from eoframework.settings import Settings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """An app whose database and Kafka cluster answer and fit."""

    app: App
    settings: Settings
    database: Database
    admin: Admin


def load_app(reference: str) -> App:
    """The App that `module:attribute` names; the current directory is importable, as it is for `python -m`.

    Raises ConfigurationError when there is none; an error inside the module itself comes out as it is.
    """
    module_name, colon, attribute = reference.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigurationError(f"{reference!r} names no app.", remedy="Write module:attribute, such as shop.app:app.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    module = _import(module_name)
    found = getattr(module, attribute, None)
    if isinstance(found, App):
        return found
    apps = sorted(name for name, value in vars(module).items() if isinstance(value, App))
    what = f"{module_name}:{attribute} is a {type(found).__name__}, not an App."
    if not hasattr(module, attribute):
        what = f"module {module_name!r} has no {attribute!r}."
    raise ConfigurationError(what, remedy=_choose(attribute, apps))


def choose_handlers(app: App, names: Collection[str]) -> tuple[Handler, ...]:
    """The handlers of these names, all without any. Raises NotFound, ConfigurationError for an app without handlers."""
    if not app.handlers:
        raise ConfigurationError(
            f"app {app.name!r} has no handlers.", remedy="Decorate a function: @app.handler(topic)."
        )
    by_name = {handler.name: handler for handler in app.handlers}
    for name in names:
        if name not in by_name:
            raise NotFound(f"app {app.name!r} has no handler {name!r}.", remedy=_choose(name, sorted(by_name)))
    return tuple(handler for handler in app.handlers if not names or handler.name in names)


def open_database(app: App, *, stop: threading.Event, wait: bool) -> Database | None:
    """The app's database, answering, with the schema this code needs and the rights it needs; None when stopped.

    Raises Unreachable without `wait`, SchemaOutOfDate, ConfigurationError.
    """
    database = app.database
    password = database.engine.url.password
    logs.hide({str(password)} if password else ())
    if not readiness.wait_until_reachable(database, stop=stop, wait=wait):
        return None
    migrating.check(database)
    readiness.check_rights(database)
    return database


def open_kafka(settings: Settings, *, stop: threading.Event, wait: bool) -> Admin | None:
    """A client of the answering cluster; None when stopped. Raises Unreachable without `wait`, ConfigurationError."""
    admin = Admin(settings)
    return admin if admin.wait_until_reachable(stop=stop, wait=wait) else None


def prepare(app: App, *, stop: threading.Event, wait: bool = True) -> Ready | None:
    """The app with its services answering and fitting; None when `stop` was set while waiting for them.

    Raises ConfigurationError, SchemaOutOfDate, Unreachable (without `wait`); nothing was started then.
    """
    settings = app.settings
    settings.require_bootstrap_servers()
    database = open_database(app, stop=stop, wait=wait)
    admin = open_kafka(settings, stop=stop, wait=wait) if database is not None else None
    return None if database is None or admin is None else Ready(app, settings, database, admin)


def check_topics(ready: Ready, handlers: Collection[Handler], reference: str) -> None:
    """Raise UnknownTopic for the handlers' topics that do not exist: subscribing to them would wait in silence."""
    letters = {topic for handler in handlers if (topic := handler.dead_letter_topic) is not None}
    names = sorted({handler.topic.name for handler in handlers} | letters)
    missing = [name for name in names if name not in ready.admin.existing([name])]
    if missing:
        raise UnknownTopic(
            f"Kafka at {ready.settings.kafka_bootstrap_servers} has no topic {', '.join(map(repr, missing))}.",
            remedy=f"Run: eo topics apply {reference}",
        )


def run_workers(
    ready: Ready, handlers: Collection[Handler], *, stop: threading.Event, once: bool, adopt_offsets: bool
) -> list[Worker]:
    """What `eo run` runs: a consumer for each handler, and pruning."""
    workers: list[Worker] = [
        ConsumeWorker(
            handler,
            app=ready.app,
            settings=ready.settings,
            admin=ready.admin,
            stop=stop,
            once=once,
            adopt_offsets=adopt_offsets,
        )
        for handler in handlers
    ]
    return [*workers, PruneWorker(ready.database, ready.settings)]


def relay_workers(ready: Ready, *, shards: Collection[int] | None = None) -> list[Worker]:
    """What `eo relay` runs; `shards` pins it to some of them."""
    return [RelayWorker(ready.database, ready.settings, admin=ready.admin, only=shards)]


def log_run_banner(ready: Ready, handlers: Collection[Handler]) -> None:
    """Say what runs against what, and what each handler may rely on."""
    _log_surroundings("run", ready)
    for handler in handlers:
        _log.info("  %s <- %s: %s", handler.group, handler.topic.name, handler.describe_guarantee())
    _log.info("  message ids are remembered for %s", _days(ready.settings.processed_retention))


def log_relay_banner(ready: Ready) -> None:
    """Say what runs against what, and what the relay's mode promises."""
    _log_surroundings("relay", ready)
    promises = {
        "transactional": "each committed outbox message appears once to read_committed readers",
        "idempotent": "AT LEAST ONCE: a relay that dies in the wrong moment publishes its last batch again",
    }
    mode = ready.settings.relay_mode
    _log.info("  mode %s: %s", mode, promises[mode])


def _log_surroundings(what: str, ready: Ready) -> None:
    _log.info(
        "%s %s: PostgreSQL %s (schema %s), Kafka %s (group protocol %s)",
        *(what, ready.app.name, readiness.where(ready.database), ready.database.schema.name),
        *(ready.settings.kafka_bootstrap_servers, ready.settings.group_protocol),
        extra={"app": ready.app.name},
    )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the module asked for: one that it imports itself and misses is the program's own error.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        raise ConfigurationError(
            f"there is no module {error.name!r}.",
            remedy=f"{_choose(name, _modules_here())} Looked in {Path.cwd()} too.",
        ) from error
    except EoError:
        raise
    except SyntaxError as error:
        raise ConfigurationError(f"{error.filename}:{error.lineno}: {error.msg}.", remedy="Correct it.") from error


def _modules_here() -> list[str]:
    return sorted(path.stem for path in Path.cwd().glob("*.py"))


def _choose(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"Did you mean {near[0]!r}?"
    return f"There is: {', '.join(known)}." if known else "There is none to choose from."


def _days(span: timedelta) -> str:
    return f"{span / timedelta(days=1):g} days"
