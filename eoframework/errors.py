"""Every error eoframework raises, named by what the reader has to do about it.

`exit_code` is what `eo` ends with when the error reaches the command line (DESIGN.md, "Exit codes").
"""

from __future__ import annotations

from uuid import UUID


class EoError(Exception):
    """Something went wrong; `what` says what and where, `remedy` says what to do."""

    exit_code = 1

    def __init__(self, what: str, *, remedy: str = "") -> None:
        super().__init__(f"{what} {remedy}".strip())
        self.what = what
        self.remedy = remedy


# --- a restart will not help: the program or its surroundings must change ---


class ConfigurationError(EoError):
    """A setting, a file or the environment is wrong; nothing was started."""

    exit_code = 3


class DeclarationError(ConfigurationError):
    """An App, Topic or handler is declared wrongly; names the file and line of the declaration."""


class SchemaOutOfDate(ConfigurationError):
    """The database schema is older or newer than this code; nothing was read or written."""


class NotFound(EoError):
    """The thing named on the command line does not exist."""

    exit_code = 5


class Unreachable(EoError):
    """Kafka or PostgreSQL cannot be reached; nothing is lost, the work waits."""

    exit_code = 69


class FailClosed(EoError):
    """Stopped to protect data: going on would mean guessing. A person must look; nothing was skipped."""

    exit_code = 70


class HandlerFailed(FailClosed):
    """A message keeps failing and blocks its partition; it was neither processed nor skipped."""


class RestartNeeded(EoError):
    """This process cannot go on, a new one can: fenced, or a fatal client error. Nothing half-done remains."""

    exit_code = 75


# --- the four classes of the two walls: by what the caller must do ---


class Retryable(EoError):
    """Nothing happened, or it was rolled back: the same work may run again."""


class LostConnection(Retryable):
    """The connection broke; whether a COMMIT under way happened is to be read from the database, never guessed."""


class TimedOut(Retryable):
    """A statement took longer than statement_timeout; rolled back."""


class IdledTooLong(LostConnection):
    """Nothing was done in the transaction for longer than idle_in_transaction_timeout; the server ended it."""


class Conflict(Retryable):
    """Deadlock, serialization failure or lock timeout: rolled back by the server; run again, smaller."""


class Permanent(EoError):
    """The same work will fail again in the same way."""


class Abortable(EoError):
    """The Kafka transaction must be aborted and its producer replaced before anything else is tried."""


class Fenced(EoError):
    """Another owner has taken over; this one may change nothing any more."""


# --- what a user's code did ---


class HandlerMisuse(Permanent):
    """A handler did something that would break exactly-once processing; its unit of work was rolled back."""


class RetryLater(EoError):
    """Raised by a handler: not now. Rolled back and tried again, after `after` seconds if given.

    It counts as an attempt like any failure, so that no message waits for ever.
    """

    def __init__(self, what: str = "the handler asked to be called again later", *, after: float | None = None) -> None:
        super().__init__(what)
        if after is not None and not 0 <= after <= 30 * 86400:
            raise ValueError(f"RetryLater(after={after}): seconds, between 0 and 30 days")
        self.after = after


class Reject(EoError):
    """Raised by a handler: this message will never do. Rolled back, and a dead letter at once with this reason."""

    because = "the handler rejected it"


class BatchItemFailed(EoError):
    """Raised by a batch handler: the message at `index` of its list failed; all of it is rolled back.

    The others run again without it, in order, and the error that it was raised from is the item's.
    """

    def __init__(self, index: int, what: str = "") -> None:
        super().__init__(what or f"the message at index {index} of the batch failed")
        self.index = index


class HandlerTimedOut(EoError):
    """A handler let its transaction run into the same timeout again and again; a failure of its message."""


class ProcessDied(EoError):
    """A message was in flight every time its process died."""


class DecodeError(Permanent):
    """A record's bytes do not make the topic's payload; the record alone fails, not its batch."""


class EncodeError(Permanent):
    """A payload, key or header cannot be written for its topic; nothing was published."""


# --- sending without a database ---


class OutcomeUnknown(EoError):
    """Kafka did not say whether messages were written, and nobody can tell from here: they may be, or not.

    Send them again with the same `id=`: whoever handles them recognises the second copy.
    """

    def __init__(self, what: str, *, ids: tuple[UUID, ...], topics: tuple[str, ...]) -> None:
        """ids: of the messages; topics: where they were sent to."""
        super().__init__(what, remedy="Send again with the same id=, so that a second copy is recognised.")
        self.ids = ids
        self.topics = topics
