"""The database that the settings name, for commands that need no app."""

from __future__ import annotations

from eoframework.db import migrating, readiness
from eoframework.db.session import Database, open_database
from eoframework.schema import Schema
from eoframework.settings import Settings


def server(settings: Settings, *, wait: bool) -> Database:
    """The database, answering. Raises ConfigurationError, Unreachable without `wait`."""
    database = open_database(settings.require_database_url(), Schema(settings.database_schema))
    readiness.wait_until_reachable(database, wait=wait)
    return database


def database(settings: Settings, *, wait: bool) -> Database:
    """The same, with the schema this code needs. Raises SchemaOutOfDate too."""
    found = server(settings, wait=wait)
    migrating.check(found)
    return found
