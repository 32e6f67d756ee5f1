"""A TCP proxy that understands just enough of Kafka's protocol to deliver one request late, as a network may.

It takes a request off the wire, breaks the client's connection (the client sends it again on a new one, which is let
through, so the client sees a call that ended well), and hands the first copy to the broker in the middle of the
client's next transaction, over the connection on which it was sent. What the broker answers to it is kept.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from eoframework import clock

PRODUCE, INIT_PRODUCER, ADD_PARTITIONS, ADD_OFFSETS, END_TXN, TXN_OFFSETS = 0, 22, 24, 25, 26, 28
_FLEXIBLE = {PRODUCE: 9, INIT_PRODUCER: 2, ADD_PARTITIONS: 3, ADD_OFFSETS: 3, END_TXN: 3, TXN_OFFSETS: 3}
"""From which version on lengths are varints and fields are followed by tagged ones."""
_BROKERS_OWN = 4
"""From this version on AddPartitionsToTxn is what brokers ask each other (they use the same listener)."""
_PATIENCE = 1.0
_QUIET = 0.05

ERRORS = {
    0: "NONE",
    15: "COORDINATOR_NOT_AVAILABLE",
    16: "NOT_COORDINATOR",
    22: "ILLEGAL_GENERATION",
    25: "UNKNOWN_MEMBER_ID",
    45: "OUT_OF_ORDER_SEQUENCE_NUMBER",
    46: "DUPLICATE_SEQUENCE_NUMBER",
    47: "INVALID_PRODUCER_EPOCH",
    48: "INVALID_TXN_STATE",
    49: "INVALID_PRODUCER_ID_MAPPING",
    51: "CONCURRENT_TRANSACTIONS",
    90: "PRODUCER_FENCED",
    113: "STALE_MEMBER_EPOCH",
    120: "TRANSACTION_ABORTABLE",
}
"""Kafka's error codes that a late request may get (org.apache.kafka.common.protocol.Errors)."""


Moment = Literal["records", "partitions", "offsets"]


class Request(NamedTuple):
    """One request of a client."""

    key: int
    version: int
    correlation: int
    frame: bytes

    @classmethod
    def parse(cls, frame: bytes) -> Request:
        return cls(*struct.unpack_from(">hhi", frame, 4), frame)

    @property
    def commits(self) -> bool:
        """Of an EndTxn (up to version 4): its last field, unless tagged fields follow."""
        last = self.frame[-1] if self.version < 3 else self.frame[-2]
        return bool(last)

    @property
    def transactional_id(self) -> str | None:
        """Of any request of `_FLEXIBLE`, the first field. None is in those of clients that fill topics."""
        at = 12 + 2 + max(0, struct.unpack_from(">h", self.frame, 12)[0])
        if self.version < _FLEXIBLE[self.key]:
            length, at = struct.unpack_from(">h", self.frame, at)[0], at + 2
        else:
            length, at = _varint(self.frame, at + 1)  # after the header's tagged fields, of which there are none
            length -= 1
        return None if length < 0 else self.frame[at : at + length].decode()

    @property
    def what(self) -> str:
        """What a report calls it."""
        if self.key == END_TXN:
            return f"EndTxn {'commit' if self.commits else 'abort'}"
        return {PRODUCE: "Produce", TXN_OFFSETS: "TxnOffsetCommit"}.get(self.key, str(self.key))


class Rule(Protocol):
    """Which request is late, and when it comes."""

    def takes(self, request: Request) -> bool:
        """Whether this one is to be held; asked while none is."""

    def due(self, request: Request) -> bool:
        """Whether the held one arrives just before this one; asked while one is held."""

    def passed(self, request: Request) -> None:
        """This one is forwarded."""

    def answered(self, key: int, frame: bytes) -> None:
        """The broker's answer to a request of this key."""


class LateEndTxn:
    """Commits or aborts come in the client's next transaction, where they do most harm: before the request of `before`.

    By default, for a commit, before further records ("records") for partitions that the client believes are part of
    the transaction; for an abort, before the transaction gets further partitions ("partitions"), or the group's
    offsets ("offsets"), since those open a fresh one.
    """

    def __init__(
        self, kind: Literal["commit", "abort"], *, before: Moment | None = None, times: int | None = None
    ) -> None:
        """times: so many of them come late; None: all."""
        self._commit = kind == "commit"
        self._left = times
        self._before = before or ("records" if self._commit else "partitions")
        self._added = False
        self._produces = 0

    def takes(self, request: Request) -> bool:
        if request.key != END_TXN or request.commits != self._commit or self._left == 0:
            return False
        if self._left is not None:
            self._left -= 1
        return True

    def due(self, request: Request) -> bool:
        if self._before == "records":
            return request.key == PRODUCE and self._produces == 1
        if self._before == "offsets":
            return request.key == ADD_OFFSETS and self._produces > 0
        return _adds_partitions(request) and self._added

    def passed(self, request: Request) -> None:
        if request.key == END_TXN:
            self._added, self._produces = False, 0
        self._produces += request.key == PRODUCE

    def answered(self, key: int, frame: bytes) -> None:
        if key == ADD_PARTITIONS and frame.endswith(b"\0\0"):
            # Ends with the last partition's error code; a transaction still being ended makes the client ask again.
            self._added = True


class LateOffsets:
    """A TxnOffsetCommit comes in the client's next transaction, when that one's own offsets are in and its end is next.

    There it does most harm: earlier it is either refused, because the group is not yet part of that transaction, or
    overwritten by the transaction's own offsets.
    """

    def __init__(self) -> None:
        self._ends = 0
        self._offsets = 0

    def takes(self, request: Request) -> bool:
        if request.key != TXN_OFFSETS:
            return False
        self._ends = self._offsets = 0
        return True

    def due(self, request: Request) -> bool:
        return request.key == END_TXN and self._ends == 1 and self._offsets == 2

    def passed(self, request: Request) -> None:
        self._ends += request.key == END_TXN
        self._offsets += request.key == TXN_OFFSETS

    def answered(self, key: int, frame: bytes) -> None:
        """Nothing to learn from it."""


@dataclass
class _Held:
    request: Request
    server: socket.socket


@dataclass
class ProtocolProxy:
    """Listens on `port`, forwards to `target`; requests come late once there is a `rule`."""

    port: int
    target: tuple[str, int]
    rule: Rule | None = None
    """None forwards everything."""
    delivered: int = 0
    answers: list[str] = field(default_factory=list)
    """What the broker said to each request that came late, by Kafka's name of the error."""
    came: list[tuple[str, str]] = field(default_factory=list)
    """Which request that was, and the answer to it: of all rules that there were."""
    _held: _Held | None = None
    _awaited: _Held | None = None
    _answered: threading.Event = field(default_factory=threading.Event)
    _pending: dict[tuple[int, int], int] = field(default_factory=dict)
    """(connection, correlation id) of a request -> its API key, for those whose answers matter."""
    _last_answer: float = 0.0
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _listener: socket.socket | None = None

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def make_late(self, rule: Rule | None) -> None:
        """From now on this rule; nothing is held. With None, what was counted stays to be read."""
        with self._lock:
            self.rule, self._held = rule, None
            if rule is not None:
                self.delivered, self.answers = 0, []

    def holds(self) -> bool:
        """Whether a request is under way."""
        return self._held is not None

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self.target)
        except OSError:
            client.close()
            return
        for side in (client, server):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._answers, args=(client, server), daemon=True).start()
        with contextlib.suppress(OSError):  # either side has hung up
            while (frame := read_frame(client)) is not None:
                if self._forward(frame, client, server):
                    return
        with contextlib.suppress(OSError):  # as above
            server.shutdown(socket.SHUT_RDWR)

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # as above
            while (frame := read_frame(server)) is not None:
                self._note_answer(frame, client, server)
                client.sendall(frame)
        with contextlib.suppress(OSError):  # as above
            client.close()

    def _note_answer(self, frame: bytes, client: socket.socket, server: socket.socket) -> None:
        correlation = struct.unpack_from(">i", frame, 4)[0]
        with self._lock:
            late = self._awaited
            if late is not None and late.server is server and late.request.correlation == correlation:
                code = error_code(late.request, frame)
                self.answers.append(ERRORS.get(code, str(code)))
                self.came.append((late.request.what, self.answers[-1]))
                self._answered.set()
                return
            key = self._pending.pop((id(client), correlation), None)
            if key == PRODUCE:
                self._last_answer = clock.monotonic()
            if key is not None and self.rule is not None:
                self.rule.answered(key, frame)

    def _forward(self, frame: bytes, client: socket.socket, server: socket.socket) -> bool:
        """Forward a request; True when it was held instead and this connection is over."""
        request = Request.parse(frame)
        if not _of_transaction(request):
            server.sendall(frame)
            return False
        with self._lock:
            rule, taken = self.rule, False
            if rule is not None and self._held is None and rule.takes(request):
                self._held, taken = _Held(request, server), True
        if taken:
            client.shutdown(socket.SHUT_RDWR)
            return True
        if rule is not None and self._held is not None and rule.due(request):
            self._wait_for_quiet()
            self._deliver()
        with self._lock:
            if rule is not None:
                rule.passed(request)
            if request.key in (PRODUCE, ADD_PARTITIONS):
                self._pending[id(client), request.correlation] = request.key
        server.sendall(frame)
        return False

    def _wait_for_quiet(self) -> None:
        """Until what the client has produced so far is in the broker's log."""
        deadline = clock.monotonic() + _PATIENCE
        while clock.monotonic() < deadline:
            with self._lock:
                unanswered = PRODUCE in self._pending.values()
            if not unanswered and clock.monotonic() - self._last_answer > _QUIET:
                return
            clock.sleep(0.005)

    def _deliver(self) -> None:
        with self._lock:
            late, self._held = self._held, None
            self._awaited = late
            self._answered.clear()
        if late is None:
            return
        with contextlib.suppress(OSError):  # the broker has hung up: it comes late for ever
            late.server.sendall(late.request.frame)
            self._answered.wait(_PATIENCE)
        self.delivered += 1


def _of_transaction(request: Request) -> bool:
    if request.key not in _FLEXIBLE or (request.key == ADD_PARTITIONS and not _adds_partitions(request)):
        return False
    return request.transactional_id is not None


def _adds_partitions(request: Request) -> bool:
    return request.key == ADD_PARTITIONS and request.version < _BROKERS_OWN


# --- frames -----------------------------------------------------------------------------------------------------------


def error_code(request: Request, answer: bytes) -> int:
    """What the broker's answer says: an EndTxn's code, or that of the first partition."""
    if request.key == END_TXN:
        tags = 1 if request.version >= 3 else 0
        return int(struct.unpack_from(">h", answer, 8 + tags + 4)[0])
    assert request.key in (TXN_OFFSETS, PRODUCE), request.key
    assert request.version >= _FLEXIBLE[request.key], "an older client than any of ours"
    at = 8 + 1 + (4 if request.key == TXN_OFFSETS else 0)  # size and correlation id, no tagged fields, throttle time
    at += 1  # one topic
    length = answer[at]  # of its name, plus one; test topics are shorter than 127
    at += length
    at += 1  # number of partitions, plus one
    return int(struct.unpack_from(">h", answer, at + 4)[0])


def _varint(frame: bytes, at: int) -> tuple[int, int]:
    """An unsigned one, and where it ends."""
    value = shift = 0
    while True:
        value |= (frame[at] & 0x7F) << shift
        if frame[at] < 0x80:
            return value, at + 1
        at, shift = at + 1, shift + 7


def read_frame(source: socket.socket) -> bytes | None:
    """One length-prefixed frame, None at the end of the stream."""
    head = _read_exactly(source, 4)
    if head is None:
        return None
    body = _read_exactly(source, struct.unpack(">i", head)[0])
    return None if body is None else head + body


def _read_exactly(source: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = source.recv(size - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)
