"""Why a dead letter of a handler cannot be sent through it again, and what to do instead."""

from __future__ import annotations

from eoframework import trial
from eoframework.app import App
from eoframework.db.dead_letter_desk import DeadLetter
from eoframework.errors import ConfigurationError, DecodeError, FailClosed
from eoframework.handlers import Handler

UNCHANGED = " Nothing was changed."
_DECODE_ERROR = f"{DecodeError.__module__}.{DecodeError.__qualname__}"


def check_replayable(app: App, letter: DeadLetter) -> None:
    """Raises what keeps the letter from being replayed: ConfigurationError or FailClosed."""
    handler = handler_of(app, letter, end=UNCHANGED)
    # Before the question for positions: its payload published anew would be wrong here, or a duplicate.
    if letter.processed_since:
        raise FailClosed(
            f"dead letter {letter.id} ({letter.consumer}): its message {letter.message_id} was processed after it was "
            f"given up on, in another delivery.{UNCHANGED}",
            remedy=f"To delete the letter: eo dead discard {letter.id}",
        )
    if not letter.has_position:
        raise _stranded(letter)
    try:
        trial.decode(handler, letter.record)
    except DecodeError as error:
        raise _unreadable(handler, letter, error) from error


def _stranded(letter: DeadLetter) -> FailClosed:
    about = f"dead letter {letter.id} ({letter.consumer}) is of topic {letter.record.topic} with the id "
    if not letter.has_started:
        return FailClosed(
            f"{about}{letter.topic_id}, and the consumer has no positions: they were forgotten.{UNCHANGED}",
            remedy="Start the consumer (eo run), which takes its positions anew; then replay the letter.",
        )
    # Published anew with the id it had, the message would be a duplicate as long as its burial is remembered.
    return FailClosed(
        f"{about}{letter.topic_id}, and the consumer stands for another topic of that name: it was re-created."
        f"{UNCHANGED}",
        remedy=f"Publish its payload anew, in this order: eo dead show {letter.id} --payload > letter-{letter.id}; "
        f"eo dead discard {letter.id} --forget-id; "
        f"eo publish MODULE:APP {letter.record.topic} < letter-{letter.id}",
    )


def _unreadable(handler: Handler, letter: DeadLetter, error: DecodeError) -> ConfigurationError:
    if letter.error_class == _DECODE_ERROR:
        return ConfigurationError(
            f"dead letter {letter.id} ({letter.consumer}) still cannot be decoded: {error.what}{UNCHANGED}",
            remedy=f"Widen the payload type of {handler.topic!r}, or: eo dead discard {letter.id}",
        )
    return ConfigurationError(
        f"dead letter {letter.id} ({letter.consumer}) was readable when it was given up on, and no longer is: the "
        f"payload type of {handler.topic!r} has changed ({handler.topic.where}): {error.what}{UNCHANGED}",
        remedy="Let the type read both shapes.",
    )


def handler_of(app: App, letter: DeadLetter, *, end: str = "") -> Handler:
    """The app's handler that the letter is of. Raises ConfigurationError, which closes with `end`."""
    found = next((handler for handler in app.handlers if handler.group == letter.consumer), None)
    if found is not None and found.topic.name == letter.record.topic:
        return found
    about = f"dead letter {letter.id} is of {letter.consumer} on {letter.record.topic}"
    if found is not None:
        raise ConfigurationError(
            f"{about}, but that handler reads {found.topic.name} now ({found.where}).{end}",
            remedy=f"eo dead show {letter.id} --payload writes its payload.",
        )
    name = letter.consumer.removeprefix(f"{app.name}.")
    if name == letter.consumer:
        raise ConfigurationError(f"{about}, not of app {app.name!r}.{end}", remedy="Give its app.")
    raise ConfigurationError(
        f"{about}, and app {app.name!r} has no handler {name!r} any more.{end}",
        remedy=f"If it was renamed, say name={name!r} where it is declared now.",
    )
