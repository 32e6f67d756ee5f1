"""What is remembered of a partition in the metadata of its committed offset.

Written in the Kafka transaction that moves the offset, so it is exactly as durable, and exactly as fenced: a zombie can
count no attempt, and none is forgotten in a crash. Whoever moves the offset with another tool writes none: that is a
fresh start.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

_FORM = re.compile(r"eo-t:((?:[a-z]+=\d{1,9};)*)")


@dataclass(frozen=True, slots=True)
class Mark:
    """Counts about the message at the committed offset, and about what came right before it."""

    attempts: int = 0
    """How often the function has failed on it."""
    crashes: int = 0
    """How often it was alone in flight when its process died, or is now."""
    takeovers: int = 0
    """How many owners have begun here and got nowhere."""
    deaths: int = 0
    """Dead letters in a row right before it."""

    def encode(self) -> str:
        """As metadata: short, and nothing at all in the usual case but who wrote it."""
        counts = ((field.name, getattr(self, field.name)) for field in fields(self))
        return "eo-t:" + "".join(f"{name}={count};" for name, count in counts if count)

    @classmethod
    def decode(cls, metadata: str) -> Mark:
        """What stands there; nothing known, if somebody else wrote it."""
        match = _FORM.fullmatch(metadata)
        if match is None:
            return cls()
        counts = dict(part.split("=") for part in match[1].split(";")[:-1])
        return cls(**{field.name: int(counts.get(field.name, 0)) for field in fields(cls)})


@dataclass(frozen=True, slots=True)
class Stand:
    """Where the group stands in a partition: the committed offset and what was written with it."""

    offset: int
    mark: Mark

    def at(self, offset: int) -> Mark:
        """What is known of the message at `offset`; the counts of another one are not its own."""
        return self.mark if offset == self.offset else Mark(deaths=self.mark.deaths)
