"""The outbox in an operator's hands, for programs: what `eo outbox` does, without the command line.

    from eoframework.outbox_desk import OutboxDesk, OutboxFilter

    desk = OutboxDesk(database, settings)
    page = desk.lines("dead", OutboxFilter(topic="orders"), limit=50)
    desk.retry(page.items[0].number)

Every change is one transaction with its audit row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Literal
from uuid import UUID

from eoframework.db.audit import whoever
from eoframework.db.outbox_desk import (
    LetterGone,
    OutboxFilter,
    OutboxLine,
    OutboxState,
    OutboxTable,
    Place,
    PutBack,
)
from eoframework.db.outbox_stats import OutboxStats, ShardStats
from eoframework.db.pending import MALFORMED
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, EoError, NotFound, Retryable, Unreachable
from eoframework.kafka.admin import Admin
from eoframework.kafka.answers import NotAuthorized, UnknownTopic
from eoframework.outbox_refs import cursor_of, parse, place_of
from eoframework.outbox_results import Discarded, OutboxCount, OutboxPage, OutboxRefusal, Retried
from eoframework.patience import patiently
from eoframework.settings import Settings

__all__ = [
    "ALL",
    "CauseHolds",
    "Discarded",
    "OutboxCount",
    "OutboxDesk",
    "OutboxFilter",
    "OutboxLine",
    "OutboxPage",
    "OutboxRefusal",
    "OutboxState",
    "OutboxStats",
    "PutBack",
    "Retried",
    "ShardStats",
]

ALL = OutboxFilter()
_AT_ONCE = 100
# librdkafka's message.max.bytes.
_CLIENT_LIMIT = 1_000_000
_TOO_LARGE = frozenset({"MSG_SIZE_TOO_LARGE", "RECORD_LIST_TOO_LARGE"})

_UNCHANGED = " Nothing was changed."
Verb = Literal["show", "retry", "discard"]
# What does the same to a handler's dead letter.
_OF_HANDLERS: dict[Verb, str] = {"show": "dead show", "retry": "dead replay MODULE:APP", "discard": "dead discard"}

_log = logging.getLogger(__name__)


class CauseHolds(EoError):
    """Kafka would refuse the message again, for the same reason; nothing was changed."""

    exit_code = 4


class OutboxDesk:
    """Reads and changes what no relay looks at: dead letters, and delayed messages that are not due.

    Pending rows are shown only: the relay may be sending them at this moment, and a row deleted under it would make it
    stop. Works while relays run, and while none does.
    """

    def __init__(
        self, database: Database, settings: Settings, *, admin: Admin | None = None, actor: str | None = None
    ) -> None:
        """`admin` is asked for topics' limits, made from the settings when needed. actor: default user@host."""
        self._table = OutboxTable(database, settings)
        self._settings = settings
        self._admin = admin
        self._actor = whoever(actor)
        self._limits: dict[str, int | None] = {}

    # --- what there is ---

    def lines(
        self,
        state: OutboxState = "dead",
        which: OutboxFilter = ALL,
        *,
        limit: int = 50,
        after: str | None = None,
    ) -> OutboxPage:
        """Messages in one state, the oldest first: dead by number, pending by shard and seq, delayed by shard and time.

        Raises NotFound for an `after` that is none.
        """
        place = None if after is None else place_of(state, after)
        found = self._table.lines(state, which, after=place, limit=limit + 1)
        items = tuple(found[:limit])
        return OutboxPage(items, cursor_of(items[-1].place) if len(found) > limit else None)

    def count(self, state: Literal["dead", "delayed"] = "dead", which: OutboxFilter = ALL) -> OutboxCount:
        """How many there are; its `up_to` bounds `retry_all` and `discard_all` to what was counted."""
        return OutboxCount(*self._table.count(state, which))

    def find(self, ref: str | int | UUID) -> OutboxLine:
        """One message, whole, by a dead letter's number, `delayed/<seq>`, `pending/<seq>` or its message id.

        Raises NotFound, which says what became of it, when and by whom.
        """
        return self._find(ref, "show")

    def _find(self, ref: str | int | UUID, verb: Verb) -> OutboxLine:
        state, number, message_id = parse(str(ref))
        if message_id is not None:
            return self._by_message_id(message_id, verb)
        found = self._table.by_number(state, number)
        if found is not None:
            return found
        if state == "dead":
            raise self._missing(number, verb)
        raise NotFound(
            f"there is no {state} outbox message {number}; it may have been sent.", remedy=f"See: eo outbox ls {state}"
        )

    def stats(self) -> OutboxStats:
        """Everything there is, counted; reads as many index entries as there are rows."""
        return self._table.stats()

    # --- what can be done ---

    def retry(self, ref: str | int | UUID, *, force: bool = False) -> PutBack:
        """A dead letter is an outbox row again, before everything of its key that waits; its key is opened.

        It keeps its message id, so a consumer that has seen it does not process it twice. On a crash: it is a dead
        letter or an outbox row, never both and never neither. Issued twice: the second finds it gone. Raises NotFound
        (unknown, retried or discarded before, of a handler), CauseHolds (`force` skips that check), Unreachable (the
        topic's limit must be asked for and Kafka is away), ConfigurationError (not a dead letter). Then nothing is
        changed.
        """
        letter = self.retriable(ref, force=force)
        try:
            return self._put_back(letter)
        except LetterGone as error:
            raise self._missing(letter.number, "retry") from error

    def retriable(self, ref: str | int | UUID, *, force: bool = False) -> OutboxLine:
        """The dead letter, if `retry` would put it back now; changes nothing, raises what `retry` would."""
        letter = self._find(ref, "retry")
        if letter.state != "dead":
            held_by = letter.held_by
            fate = "it is sent without help" if held_by is None else f"it waits for dead letter {held_by}"
            raise ConfigurationError(
                f"outbox message {letter.message_id} is {letter.state}, not dead; {fate}.{_UNCHANGED}",
                remedy="See: eo outbox stats"
                if held_by is None
                else f"eo outbox retry {held_by}, or eo outbox discard {held_by}",
            )
        if not force:
            self._check(letter)
        return letter

    def retry_each(self, refs: Sequence[str | int | UUID], *, force: bool = False) -> Retried:
        """`retry` for every one of them, a transaction each, in the order of their numbers.

        All are looked at before the first is changed: raises what `retriable` does, and nothing is changed then. On a
        crash, or when it raises Retryable: say it again for the rest. What vanishes meanwhile is in `gone`.
        """
        letters = {letter.number: letter for letter in [self.retriable(ref, force=force) for ref in refs]}
        return self._retry_each((letters[number] for number in sorted(letters)), force=True)

    def retry_all(self, which: OutboxFilter = ALL, *, force: bool = False, up_to: int | None = None) -> Retried:
        """`retry` for every dead letter that there is now and that the filter lets through, a transaction each.

        On a crash, or when it raises Unreachable: say it again for the rest. What Kafka would refuse again stays as it
        is and is in `refused`; what dies again meanwhile is not sent again. up_to: from `count`, default all there are.
        """
        return self._retry_each(self._all("dead", which, up_to), force=force)

    def _retry_each(self, letters: Iterable[OutboxLine], *, force: bool) -> Retried:
        done = Retried()
        for letter in letters:
            try:
                if not force:
                    self._check(letter)
                put_back = partial(self._put_back, letter)
                done.moved.append(patiently(put_back, f"Dead letter {letter.ref}", len(done.moved)))
            except LetterGone:
                done.gone.append(letter.number)
            except CauseHolds as why:
                done.refused.append(OutboxRefusal(letter, why))
        return done

    def discard(self, ref: str | int | UUID) -> OutboxLine:
        """A dead letter is deleted for good and its key goes on without it; or a delayed message is never sent.

        On a crash: done with its audit row, or not at all. Raises NotFound (unknown, retried or discarded before, of a
        handler, or due meanwhile), ConfigurationError (pending: only relays may delete those).
        """
        line = self.discardable(ref)
        try:
            self._discard(line)
        except LetterGone as error:
            if line.state == "dead":
                raise self._missing(line.number, "discard") from error
            raise NotFound(
                f"delayed message {line.message_id} is not delayed any more: it became due or was discarded. "
                "Nothing was changed.",
                remedy=f"See: eo outbox show {line.message_id}",
            ) from error
        return line

    def discardable(self, ref: str | int | UUID) -> OutboxLine:
        """The message, if `discard` would delete it now; changes nothing, raises what `discard` would."""
        line = self._find(ref, "discard")
        if line.state == "pending":
            raise ConfigurationError(
                f"outbox message {line.message_id} is pending; only relays may delete those.{_UNCHANGED}",
                remedy="It is sent, or refused by Kafka; then discard the dead letter.",
            )
        return line

    def discard_each(self, refs: Sequence[str | int | UUID]) -> Discarded:
        """`discard` for every one of them, a transaction each; all are looked at before the first is changed.

        Raises what `discardable` does, and nothing is changed then; on a crash, or when it raises Retryable: say it
        again for the rest. What vanishes meanwhile is in `gone`.
        """
        lines = {line.ref: line for line in [self.discardable(ref) for ref in refs]}
        return self._discard_each(lines.values())

    def discard_all(
        self, state: Literal["dead", "delayed"] = "dead", which: OutboxFilter = ALL, *, up_to: int | None = None
    ) -> list[OutboxLine]:
        """`discard` for every message in the state that there is now and that the filter lets through."""
        return self._discard_each(self._all(state, which, up_to)).lines

    def _discard_each(self, lines: Iterable[OutboxLine]) -> Discarded:
        done = Discarded()
        for line in lines:
            try:
                patiently(partial(self._discard, line), f"Outbox message {line.ref}", len(done.lines))
            except LetterGone:
                done.gone.append(line.ref)  # the audit says who was faster; or the relay, as it became due
            else:
                done.lines.append(line)
        return done

    def _put_back(self, letter: OutboxLine) -> PutBack:
        done = self._table.put_back(letter.number, actor=self._actor)
        _log.info(
            "dead letter %d is outbox message %s again (shard %d, seq %d); %s.",
            *(done.dead_letter, done.message_id, done.shard, done.seq),
            "its key goes on with it" if done.opened else "it keeps its message id",
        )
        return done

    def _discard(self, line: OutboxLine) -> None:
        if line.state == "dead":
            self._table.discard(line.number, actor=self._actor)
        else:
            self._table.discard_delayed(line, actor=self._actor)
        _log.warning("outbox message %s (%s, %s) discarded; it is never sent.", line.message_id, line.ref, line.topic)

    def _all(self, state: Literal["dead", "delayed"], which: OutboxFilter, up_to: int | None) -> Iterator[OutboxLine]:
        last = self._table.count(state, which)[1] if up_to is None else up_to
        after: Place | None = None
        while page := self._table.lines(state, which, after=after, limit=_AT_ONCE):
            yield from (line for line in page if line.number <= last)
            after = page[-1].place
            # Those that die again meanwhile come behind; read on, one might follow them for ever.
            if state == "dead" and page[-1].number >= last:
                return

    # --- refusals ---

    def _by_message_id(self, message_id: UUID, verb: Verb) -> OutboxLine:
        found = self._table.by_message_id(message_id)
        if len(found) == 1:
            return found[0]
        if found:
            raise NotFound(
                f"{len(found)} outbox messages carry the id {message_id}.{_unchanged(verb)}",
                remedy=f"Say which: {', '.join(line.ref for line in found)}",
            )
        fate = self._table.fate_of(message_id)
        raise NotFound(
            f"the outbox holds no message {message_id}{f': {fate}' if fate else ''}.{_unchanged(verb)}",
            remedy="Sent messages are deleted. See: eo outbox ls",
        )

    def _missing(self, number: int, verb: Verb) -> NotFound:
        fate = self._table.fates([number]).get(number)
        if fate == "handler":
            return NotFound(
                f"dead letter {number} is of a handler, not of the outbox.{_unchanged(verb)}",
                remedy=f"eo {_OF_HANDLERS[verb]} {number}",
            )
        why = f"is no more: {fate}" if fate else "does not exist"
        return NotFound(f"dead letter {number} {why}.{_unchanged(verb)}", remedy="See: eo outbox ls")

    def _check(self, letter: OutboxLine) -> None:
        """Raise CauseHolds if Kafka would certainly refuse it again; where that is not certain, Kafka decides."""
        about = f"dead letter {letter.ref} for {letter.topic}"
        if letter.error_class == MALFORMED:
            raise CauseHolds(
                f"{about}: {letter.cause} Nothing was changed.",
                remedy=f"Publish it anew by the App, then: eo outbox discard {letter.ref}",
            )
        if letter.error_class not in _TOO_LARGE and not any(name in (letter.cause or "") for name in _TOO_LARGE):
            return
        size = letter.size + len(letter.key or b"")
        client = int(self._settings.kafka.get("message.max.bytes", _CLIENT_LIMIT))
        if size > client:
            raise CauseHolds(
                f"{about} has {size} bytes; the client sends at most {client}. Nothing was changed.",
                remedy=f"Raise EO_KAFKA_MESSAGE_MAX_BYTES for the relay and here, and max.message.bytes of "
                f"{letter.topic}; or send it with --force, or discard it.",
            )
        limit = self._limit(letter.topic)
        if limit is not None and size > limit:
            raise CauseHolds(
                f"{about} has {size} bytes; the topic takes at most {limit}. Nothing was changed.",
                remedy=f"Raise max.message.bytes of {letter.topic}; or send it with --force, or discard it.",
            )

    def _limit(self, topic: str) -> int | None:
        """The topic's limit in bytes, None where it is not known or where compression may make a message fit."""
        if topic not in self._limits:
            self._limits[topic] = self._ask_limit(topic)
        return self._limits[topic]

    def _ask_limit(self, topic: str) -> int | None:
        kafka = self._settings.kafka
        if kafka.get("compression.type", kafka.get("compression.codec", "none")) != "none":
            return None
        self._admin = self._admin or Admin(self._settings)
        try:
            config = self._admin.describe(topic, settings_optional=True).config
        except Retryable as error:
            raise Unreachable(
                f"the limit of topic {topic} cannot be asked for: {error.what} Its dead letters were left alone.",
                remedy="Start Kafka, or put it back without asking with --force: then the relay finds out.",
            ) from error
        except (UnknownTopic, NotAuthorized) as error:
            _log.debug("the limit of topic %s is not known: %s", topic, error)
            return None
        if config.get("compression.type", "producer") not in ("producer", "uncompressed"):
            return None
        return int(config["max.message.bytes"]) if "max.message.bytes" in config else None


def _unchanged(verb: Verb) -> str:
    return "" if verb == "show" else _UNCHANGED
