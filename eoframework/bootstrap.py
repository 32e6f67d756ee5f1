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
from eoframework.db import home, migrating, readiness
from eoframework.db.grants import Purpose
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, EoError, NotFound
from eoframework.handlers import Handler
from eoframework.kafka.admin import Admin
from eoframework.kafka.answers import UnknownTopic
from eoframework.lifecycle import Worker
from eoframework.prune import PruneWorker
from eoframework.relay import RelayWorker
from eoframework.settings import Settings
from eoframework.transform.worker import TransformWorker
from eoframework.transforms import Transform

_log = logging.getLogger(__name__)

Runnable = Handler | Transform


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


def choose(app: App, names: Collection[str]) -> tuple[Runnable, ...]:
    """The handlers and transforms of these names, all without any. Raises NotFound, ConfigurationError for an app
    that has none.
    """
    declared: tuple[Runnable, ...] = (*app.handlers, *app.transforms)
    if not declared:
        raise ConfigurationError(
            f"app {app.name!r} has no handlers and no transforms.",
            remedy="Decorate a function: @app.handler(topic), or @app.transform(topic, to=...).",
        )
    known = sorted(one.name for one in declared)
    for name in names:
        if name not in known:
            raise NotFound(f"app {app.name!r} has no handler or transform {name!r}.", remedy=_choose(name, known))
    return tuple(one for one in declared if not names or one.name in names)


def choose_handler(app: App, name: str) -> Handler:
    """The handler of this name. Raises NotFound, ConfigurationError for an app without any."""
    (found,) = choose(app, [name])
    if isinstance(found, Handler):
        return found
    raise ConfigurationError(
        f"{name!r} is a transform ({found.where}): where it stands are its group's offsets in Kafka.",
        remedy=f"Stop it and move them: eo position set {found.group} PARTITION OFFSET. What it sends then is sent "
        "again, and counts again.",
    )


def open_database(app: App, *, stop: threading.Event, wait: bool, purpose: Purpose | None = "app") -> Database | None:
    """The app's database, answering, with the schema this code needs and the rights it needs; None when stopped.

    purpose: what its role is for; None where the command itself will say what is missing.

    Raises Unreachable without `wait`, SchemaOutOfDate, ConfigurationError.
    """
    database = app.database
    password = database.engine.url.password
    logs.hide({str(password)} if password else ())
    if not readiness.wait_until_reachable(database, stop=stop, wait=wait):
        return None
    migrating.check(database)
    if purpose is not None:
        readiness.check_rights(database, purpose)
    return database


def open_kafka(settings: Settings, *, stop: threading.Event, wait: bool) -> Admin | None:
    """A client of the answering cluster; None when stopped. Raises Unreachable without `wait`, ConfigurationError."""
    admin = Admin(settings)
    return admin if admin.wait_until_reachable(stop=stop, wait=wait) else None


def prepare(app: App, *, stop: threading.Event, wait: bool = True, purpose: Purpose | None = "app") -> Ready | None:
    """The app with its services answering and fitting; None when `stop` was set while waiting for them.

    Raises ConfigurationError, SchemaOutOfDate, FailClosed (a copied database), Unreachable (without `wait`); nothing
    was started then.
    """
    settings = app.settings
    settings.require_bootstrap_servers()
    database = open_database(app, stop=stop, wait=wait, purpose=purpose)
    if database is not None and purpose is not None:
        home.check(database)
    admin = open_kafka(settings, stop=stop, wait=wait) if database is not None else None
    return None if database is None or admin is None else Ready(app, settings, database, admin)


def check_topics(ready: Ready, chosen: Collection[Runnable], reference: str) -> None:
    """Raise UnknownTopic for topics that do not exist: reading from one would wait in silence, sending would fail."""
    needed = {one.topic.name for one in chosen}
    needed |= {topic for one in chosen if (topic := one.dead_letter_topic) is not None}
    needed |= {target.name for one in chosen if isinstance(one, Transform) for target in one.targets}
    missing = [name for name in sorted(needed) if name not in ready.admin.existing([name])]
    if missing:
        raise UnknownTopic(
            f"Kafka at {ready.settings.kafka_bootstrap_servers} has no topic {', '.join(map(repr, missing))}.",
            remedy=f"Run: eo topics apply {reference}",
        )


def run_workers(
    ready: Ready,
    chosen: Collection[Runnable],
    *,
    stop: threading.Event,
    once: bool,
    adopt_offsets: bool,
    worker_index: int | None = None,
) -> list[Worker]:
    """What `eo run` runs: a consumer for each handler, a worker for each transform, and pruning."""
    app, admin = ready.app, ready.admin
    settings = _settings_of_worker(ready.settings, worker_index)
    workers: list[Worker] = []
    for one in chosen:
        if isinstance(one, Transform):
            workers.append(TransformWorker(one, app=app, settings=settings, admin=admin, stop=stop, once=once))
        else:
            workers.append(
                ConsumeWorker(
                    one, app=app, settings=settings, admin=admin, stop=stop, once=once, adopt_offsets=adopt_offsets
                )
            )
    return [*workers, PruneWorker(ready.database, settings)]


def _settings_of_worker(settings: Settings, worker_index: int | None) -> Settings:
    # Two processes of one instance would take the same transactional.id, and fence each other for ever.
    if worker_index is None or settings.instance is None:
        return settings
    return settings.model_copy(update={"instance": f"{settings.instance}.{worker_index}"})


def relay_workers(ready: Ready, *, shards: Collection[int] | None = None) -> list[Worker]:
    """What `eo relay` runs; `shards` pins it to some of them."""
    return [RelayWorker(ready.database, ready.settings, admin=ready.admin, only=shards)]


def log_run_banner(ready: Ready, chosen: Collection[Runnable]) -> None:
    """Say what runs against what, and what each of them may rely on."""
    _log_surroundings("run", ready)
    for one in chosen:
        _log.info("  %s <- %s: %s", one.group, one.topic.name, one.describe_guarantee())
    if any(isinstance(one, Handler) for one in chosen):
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
