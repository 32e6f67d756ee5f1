"""External calls in a person's hands: which ones nobody knows about, and what a person found out."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection

from eoframework import events
from eoframework.db import audit
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, FailClosed, NotFound
from eoframework.external import encode_result, idempotency_key

_COLUMNS = """
SELECT e.id, c.name AS consumer, e.name, e.message_id, c.topic, e.partition, e."offset", e.calls, e.owner,
    e.claimed_at, e.lease_until, e.done_at, e.error_class, e.result::text AS result,
    e.owner IS NOT NULL AND e.lease_until > clock_timestamp() AS running,
    (SELECT min(d.id) FROM {eo}.dead_letter d WHERE d.origin = 'handler' AND d.consumer_id = e.consumer_id
        AND d.topic_id IS NOT NULL AND d.message_id = e.message_id) AS dead_letter
FROM {eo}.external_call e JOIN {eo}.consumer c ON c.id = e.consumer_id
"""
_LS = f"""{_COLUMNS}
WHERE e.id > %(after)s AND (%(consumer)s::text IS NULL OR c.name = %(consumer)s)
    AND (%(everything)s OR e.done_at IS NULL AND e.owner IS NOT NULL AND e.lease_until <= clock_timestamp())
ORDER BY e.id LIMIT %(limit)s
"""
_CONSUMERS = "SELECT name FROM {eo}.consumer ORDER BY name"
_ONE = f"{_COLUMNS} WHERE e.id = %(id)s FOR UPDATE OF e"
# fence + 1: should the caller still be at it after all, its word comes too late.
_DONE = """
UPDATE {eo}.external_call SET fence = fence + 1, done_at = clock_timestamp(), result = %(result)s::json
WHERE id = %(id)s AND done_at IS NULL
"""
_NOT_DONE = """
UPDATE {eo}.external_call SET fence = fence + 1, owner = NULL WHERE id = %(id)s AND done_at IS NULL
"""


@dataclass(frozen=True, slots=True)
class CallLine:
    """One call for one message, as stored."""

    id: int
    consumer: str
    name: str
    message_id: UUID
    topic: str
    partition: int
    offset: int
    calls: int
    owner: str | None
    claimed_at: datetime
    lease_until: datetime
    done_at: datetime | None
    error_class: str | None
    result: str | None
    running: bool
    dead_letter: int | None
    """The number of the message's dead letter, if it has become one."""

    @property
    def key(self) -> str:
        """The idempotency key that its calls carried."""
        return idempotency_key(self.consumer, self.message_id, self.name)

    @property
    def state(self) -> str:
        """done, running (a lease runs), free (it surely did not happen) or unresolved (nobody knows)."""
        if self.done_at is not None:
            return "done"
        if self.owner is None:
            return "free"
        return "running" if self.running else "unresolved"


class ExternalDesk:
    """Each call is one transaction; every change leaves an audit row."""

    def __init__(self, database: Database, *, actor: str | None = None) -> None:
        self._database = database
        self._actor = audit.whoever(actor)

    def lines(
        self, *, consumer: str | None = None, everything: bool = False, after: int = 0, limit: int = 100
    ) -> list[CallLine]:
        """The unresolved calls, or all; the next page begins after the last one's id.

        Raises NotFound for a consumer nobody knows: an empty list would look like good news.
        """
        values = {"consumer": consumer, "everything": everything, "after": after, "limit": limit}
        with self._database.begin("reading external calls") as connection:
            if consumer is not None:
                _refuse_unknown(consumer, [row[0] for row in self._run(connection, _CONSUMERS, {})])
            return [CallLine(*row) for row in self._run(connection, _LS, values)]

    def resolve(self, id: int, result: object) -> CallLine:  # noqa: A002 - its name
        """It did happen, with this result: the message uses it when it runs again. Returns the line from before.

        On a crash: resolved with its audit row, or neither. Raises NotFound, FailClosed (running, or it has a result),
        ConfigurationError for a result that cannot be stored; nothing was changed then.
        """
        try:
            text = encode_result(result)
        except ValueError as error:
            raise ConfigurationError(f"the result {error}.", remedy="Give what the function returns.") from error
        return self._change(id, "external.resolve", _DONE, {"result": text})

    def not_done(self, id: int) -> CallLine:  # noqa: A002 - its name
        """It surely did not happen: it is called when the message runs again. Otherwise as `resolve`."""
        return self._change(id, "external.not_done", _NOT_DONE, {})

    def _change(self, call_id: int, action: str, sql: str, values: Mapping[str, object]) -> CallLine:
        with self._database.brief(f"resolving external call {call_id}") as connection:
            found = self._run(connection, _ONE, {"id": call_id})
            if not found:
                raise NotFound(f"there is no external call {call_id}.", remedy="See: eo external ls --all")
            line = CallLine(*found[0])
            _check(line)
            connection.exec_driver_sql(self._database.schema.sql(sql), {"id": call_id, **values})
            detail = {"consumer": line.consumer, "call": line.name, "message_id": line.message_id, "was": line.state}
            audit.record(
                connection,
                self._database.schema,
                actor=self._actor,
                action=action,
                subject=f"external_call/{call_id}",
                detail={**detail, **{name: json.loads(str(value)) for name, value in values.items()}},
            )
            events.emit("external.resolving", id=call_id)
        events.emit("external.resolved", id=call_id)
        return line

    def _run(self, connection: Connection, template: str, values: Mapping[str, object]) -> Sequence[Any]:
        return connection.exec_driver_sql(self._database.schema.sql(template), dict(values)).all()


def _refuse_unknown(consumer: str, known: Sequence[str]) -> None:
    if consumer not in known:
        near = difflib.get_close_matches(consumer, known, n=1)
        listed = f"Known: {', '.join(known)}." if known else "There is none yet."
        raise NotFound(
            f"the database knows no consumer {consumer!r}.", remedy=f"Did you mean {near[0]!r}?" if near else listed
        )


def _check(line: CallLine) -> None:
    what = (
        f"external call {line.id} ({line.name!r} of {line.consumer} for {line.topic}[{line.partition}]@{line.offset})"
    )
    if line.done_at is not None:
        raise FailClosed(f"{what} has a result since {line.done_at.isoformat()}.", remedy="Nothing is to be resolved.")
    if line.running:
        raise FailClosed(
            f"{what} may be running: {line.owner} has its lease until {line.lease_until.isoformat()}.",
            remedy="Wait until then; nothing was changed.",
        )
