"""The audit table: who changed what by a tool, and why it was as it was before.

A row is written in the transaction of the change itself, so one is never there without the other.
"""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from eoframework.schema import Schema

_RECORD = """
INSERT INTO {eo}.audit (actor, action, subject, detail)
VALUES (%(actor)s, %(action)s, %(subject)s, %(detail)s::json) RETURNING id
"""
_LAST = """
SELECT DISTINCT ON (subject) id, at, actor, action, subject, detail FROM {eo}.audit
WHERE subject = ANY(%(subjects)s::text[]) ORDER BY subject, id DESC
"""


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change, as recorded."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    detail: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.action} by {self.actor} at {self.at.isoformat(timespec='seconds')}"


def record(
    connection: Connection, schema: Schema, *, actor: str, action: str, subject: str, detail: Mapping[str, object]
) -> int:
    """Write one audit row into the caller's transaction; returns its number.

    On a crash: it is there if and only if the change is. action: "<tool>.<verb>", such as "dead.replay". subject:
    "dead_letter/12", "outbox_message/<id>", "consumer/<group>". detail: what JSON can hold; anything else as its str().
    """
    values = {"actor": actor, "action": action, "subject": subject, "detail": json.dumps(detail, default=str)}
    return int(connection.exec_driver_sql(schema.sql(_RECORD), values).scalar_one())


def last(connection: Connection, schema: Schema, subjects: Collection[str]) -> dict[str, AuditEntry]:
    """The last change of each of the subjects; those that were never changed are left out."""
    if not subjects:
        return {}
    rows = connection.exec_driver_sql(schema.sql(_LAST), {"subjects": list(subjects)})
    return {row.subject: AuditEntry(*row) for row in rows}


def whoever(given: str | None = None) -> str:
    """The actor of this process: the one given, else `user@host`."""
    if given:
        return given
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user has no name
        user = "?"
    return f"{user}@{socket.gethostname()}"
