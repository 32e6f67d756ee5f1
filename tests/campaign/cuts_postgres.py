"""A proxy that reads PostgreSQL's protocol, knows what a transaction has done, and cuts its COMMIT."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from tests.campaign.cuts_fates import Fates
from tests.listener import Moment
from tests.proxy import BytesProxy, Hearing

PUBLISH = "a web application's publish"
_OWN = {
    "SET next_offset = ": "a batch",
    'DELETE FROM "eo".outbox_message': "the relay's delete",
    "INSERT INTO visit": PUBLISH,
}
_BETWEEN = {
    "SET epoch = p.epoch + 1": "a claim",
    "SET epoch = epoch + 1": "a claim renewed",
    'UPDATE "eo".relay_shard': "the relay's leases",
}
"""What a statement of a transaction makes it, by a piece of its text. Of one that only reads nothing is in doubt."""
_STARTUP = frozenset({196608, 196610})
"""Protocol 3.0 and 3.2; other packets without a type ask for encryption, and another such packet follows."""


@dataclass
class Conversation:
    """What one client has said so far."""

    _buffer: bytearray = field(default_factory=bytearray)
    _begun: bool = False
    _prepared: dict[bytes, str] = field(default_factory=dict)
    _doing: str = ""

    def hear(self, data: bytes) -> str | None:
        """What its transaction is about, when it asks to COMMIT with the end of `data`."""
        self._buffer += data
        found = None
        while (message := self._next()) is not None:
            found = self._note(*message)
        return found

    def _next(self) -> tuple[bytes, bytes] | None:
        """The next whole message: its type (none at the beginning), and what is in it."""
        head = 1 if self._begun else 0
        if len(self._buffer) < head + 4:
            return None
        (size,) = struct.unpack_from(">i", self._buffer, head)
        if len(self._buffer) < head + size:
            return None
        kind, body = bytes(self._buffer[:head]), bytes(self._buffer[head + 4 : head + size])
        del self._buffer[: head + size]
        return kind, body

    def _note(self, kind: bytes, body: bytes) -> str | None:
        if not self._begun:
            self._begun = struct.unpack_from(">i", body)[0] in _STARTUP
        elif kind == b"P":
            name, text, _ = body.split(b"\0", 2)
            self._prepared[name] = text.decode()
        elif kind == b"B":
            _, name, _ = body.split(b"\0", 2)
            self._does(self._prepared.get(name, ""))
        elif kind == b"Q":
            return self._says(body.rstrip(b"\0").decode())
        return None

    def _says(self, text: str) -> str | None:
        if text.startswith("BEGIN"):
            self._doing = ""
        if text == "COMMIT":
            return self._doing
        self._does(text)
        return None

    def _does(self, text: str) -> None:
        for piece, what in (_BETWEEN | _OWN).items():
            if piece in text and self._doing not in _OWN.values():
                self._doing = what


class PostgresProxy(BytesProxy):
    """Cuts at COMMIT as `fates` has it."""

    def __init__(self, server: tuple[str, int]) -> None:
        self.fates: Fates | None = None
        """None: everything passes."""
        super().__init__(server)

    def hearing(self) -> Hearing:
        conversation = Conversation()
        return lambda data: self._fate(conversation.hear(data))

    def _fate(self, what: str | None) -> Moment | None:
        fates = self.fates
        return fates.draw("COMMIT", what, seldom=what in _BETWEEN.values()) if fates is not None and what else None
