"""What the client hands out, as the values the rest of the program works with."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

from confluent_kafka import Message as ClientMessage

from eoframework.message import Headers, Record


class Fetched(NamedTuple):
    """One delivery as the client holds it; its record is made when it is wanted.

    Made of thousands at once, the records' many small parts push one another out of the processor's cache.
    """

    partition: int
    offset: int
    message: ClientMessage

    def __str__(self) -> str:
        return f"{self.message.topic()}[{self.partition}]@{self.offset}"

    def record(self) -> Record:
        """The record; to be asked for once: a header that is not UTF-8 raises only the first time."""
        return record_of(self.message)


def record_of(message: ClientMessage) -> Record:
    """The record the client handed out; one that it cannot read whole says so."""
    kind, timestamp = message.timestamp()
    try:
        headers: Headers = tuple(_ask_headers(message) or ())
        unreadable = ""
    except (SystemError, UnicodeDecodeError) as error:
        headers, unreadable = (), f"the name of a header is not UTF-8 ({error.__cause__ or error})"
    # Not Record(...), which costs as much again: every message there is passes here.
    return _new(
        Record,
        (
            message.topic() or "",
            message.partition() or 0,
            message.offset() or 0,
            message.key(),
            message.value(),
            headers,
            timestamp if kind else -1,
            unreadable,
        ),
    )


_new: Callable[[type[Record], tuple[object, ...]], Record] = tuple.__new__

# A header name that is not UTF-8 makes the client return null pointers together with an exception. A plain call does
# not always look for that; this one does. Asked for once: the second time there is no exception.
_ask_headers = operator.methodcaller("headers")
