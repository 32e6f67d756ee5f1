"""The calls a handler declared, made for one message before its transaction begins.

    claim, COMMIT -> call, with no transaction open -> result, COMMIT under the claim's fence

A crash leaves the claim without a result. Then nobody knows whether the call happened, and no row could tell: the
handler's `unresolved` decides. Everything after the result is as exactly-once as the handler's other effects.
"""

from __future__ import annotations

import json
import logging
from uuid import UUID

from eoframework import events
from eoframework.db.external_calls import Busy, CallId, Claimed, Done, ExternalCallRows, Open, Processed
from eoframework.db.position import Stream
from eoframework.db.session import Connection, Database
from eoframework.errors import Retryable
from eoframework.external import (
    CallUnresolved,
    External,
    ExternalCall,
    InFlight,
    NotDone,
    Results,
    encode_result,
    idempotency_key,
)
from eoframework.handlers import Handler
from eoframework.message import Message, position_id

_log = logging.getLogger(__name__)


class ExternalCalls:
    """One worker thread's; it remembers what the database could not be told."""

    def __init__(self, handler: Handler, database: Database, stream: Stream, *, owner: str) -> None:
        """`owner` names this thread and no other, ever: host, process and something random."""
        self._handler = handler
        self._database = database
        self._stream = stream
        self._owner = owner
        self._rows = ExternalCallRows(database.schema)
        self._unmade: set[CallId] = set()
        self._unstored: tuple[CallId, int, str] | None = None

    def prepare(self, message: Message[object]) -> Results:
        """The results of the handler's calls for this message, made now unless they are stored; for Tx.enter.

        Call it with no transaction open, for a message whose handler would run next: neither behind another of its
        lane nor decoded in vain. A message processed before is not called for: None.
        On a crash: see External. Raises Retryable (the database's trouble: run the message again, it is no attempt);
        anything else is the message's failure, as if its handler had raised it: NotDone, CallUnresolved, InFlight
        (another worker's lease still runs; no attempt either), or what the function raised.
        """
        results: dict[str, object] = {}
        for external in self._handler.external:
            result = self._result(external, message)
            if result is None:
                return None
            results[external.name] = json.loads(result)
        return results

    def stored(self, connection: Connection, message: Message[object]) -> Results:
        """The results stored for this message; calls nothing."""
        found = self._rows.results(connection, self._stream.consumer_id, self._identity(message))
        return {name: json.loads(result) for name, result in found.items()}

    def settle(self, connection: Connection, message: Message[object]) -> None:
        """In the transaction of the message's effects: its results are needed only as long as its id is."""
        if self._handler.external:
            self._rows.settle(connection, self._stream.consumer_id, self._identity(message))

    # --- one call ---

    def _result(self, external: External, message: Message[object]) -> str | None:
        """The JSON of the result; None for a message processed before."""
        call = CallId(self._stream.consumer_id, self._identity(message), external.name)
        kept = self._store_kept(call)
        if kept is not None:
            return kept
        what = f"{self._handler.group}: external call {external.name!r} for {message}"
        unmade = call in self._unmade
        self._unmade.add(call)
        with self._rows.begin(self._database, what) as connection:
            standing = self._rows.claim(
                connection,
                call,
                place=(message.partition, message.offset),
                owner=self._owner,
                lease=external.lease,
                again=external.unresolved == "retry",
                unmade=unmade,
            )
        self._unmade.discard(call)
        match standing:
            case Processed():
                return None
            case Done(result):
                return result
            case Busy(owner, seconds):
                raise InFlight(f"{what}: {owner} may be making it for another {seconds:.1f} s.", after=seconds)
            case Open():
                raise self._unresolved(what, external, standing)
            case Claimed():
                events.emit("external.claimed", call=external.name, fence=standing.fence)
                return self._make(what, external, message, call, standing)

    def _make(
        self, what: str, external: External, message: Message[object], call: CallId, claimed: Claimed
    ) -> str | None:
        key = idempotency_key(self._handler.group, call.message_id, external.name)
        try:
            result = external.function(message, ExternalCall(key, claimed.calls, claimed.fence))
        except Exception as error:
            self._ended(what, call, claimed.fence, error)
            raise
        events.emit("external.called", call=external.name, fence=claimed.fence)
        try:
            text = encode_result(result)
        except ValueError as error:
            unusable = CallUnresolved(
                f"{what} was made, but what it returned {error}: the result is not stored.",
                remedy=f"Let {external.name!r} return less, as JSON, and then: eo external ls",
            )
            self._ended(what, call, claimed.fence, unusable)
            raise unusable from error
        return self._keep(what, call, claimed.fence, text)

    def _keep(self, what: str, call: CallId, fence: int, result: str) -> str:
        # Remembered until the database has it: an outage in the middle of a call would leave a call unresolved whose
        # result is at hand.
        self._unstored = (call, fence, result)
        with self._rows.begin(self._database, what) as connection:
            stored = self._rows.store(connection, call, fence, result)
        self._unstored = None
        if not stored:
            raise InFlight(
                f"{what} outlasted its lease and was taken over, or resolved by hand; its result is not ours to store.",
                after=0.0,
            )
        events.emit("external.stored", call=call.name, fence=fence)
        return result

    def _store_kept(self, call: CallId) -> str | None:
        """Store what an earlier run could not; returns it if it is this call's.

        It may have been stored after all, its COMMIT was only not confirmed: then nothing is stored here, and the claim
        finds it.
        """
        kept = self._unstored
        if kept is None:
            return None
        with self._rows.begin(self._database, f"{self._handler.group}: result of {kept[0].name!r}") as connection:
            stored = self._rows.store(connection, *kept)
        self._unstored = None
        return kept[2] if stored and kept[0] == call else None

    def _ended(self, what: str, call: CallId, fence: int, error: Exception) -> None:
        """The call ended with an error: note what is known. If the database cannot be told, its trouble comes first."""
        name = type(error).__name__
        try:
            with self._rows.begin(self._database, what) as connection:
                if isinstance(error, NotDone):
                    self._rows.release(connection, call, fence, name)
                else:
                    self._rows.leave(connection, call, fence, name)
            events.emit("external.ended", call=call.name, fence=fence, error=error)
        except Retryable as trouble:
            # Only the class: its text may quote the payload.
            _log.warning("%s ended with %s; it counts as unresolved, and nothing is lost", what, name)
            raise trouble from error

    def _unresolved(self, what: str, external: External, standing: Open) -> CallUnresolved:
        seen = f" It ended with {standing.error_class}." if standing.error_class else ""
        if external.unresolved == "give_up":
            return CallUnresolved(f"{what} may have happened; given up, as unresolved='give_up' says.{seen}")
        return CallUnresolved(
            f"{what} may have happened; nobody knows.{seen}",
            remedy=f"Find out, then: eo external resolve {standing.id} --result JSON (it did), or --not-done (it did "
            "not), and replay the message: eo dead replay MODULE:APP ID",
        )

    def _identity(self, message: Message[object]) -> UUID:
        return message.id or position_id(self._stream.topic_id, message.partition, message.offset)
