"""A TCP proxy that understands just enough of Kafka's protocol to deliver an `EndTxn` late, as a network may.

It takes an EndTxn off the wire, breaks the client's connection (the client re-sends on a new one, which is let
through, so the client sees a transaction that ended well), and hands the first copy to the broker in the middle of the
client's next transaction, over the connection on which it was sent.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from dataclasses import dataclass, field

from eoframework import clock

PRODUCE, ADD_PARTITIONS, END_TXN = 0, 24, 26
_BROKERS_OWN = 4
"""From this version on AddPartitionsToTxn is what brokers ask each other (they use the same listener)."""
_PATIENCE = 1.0
_QUIET = 0.05


@dataclass
class _Held:
    server: socket.socket
    frame: bytes


@dataclass
class EndTxnProxy:
    """Listens on `port`, forwards to `target`; holds commits or aborts once `hold` is set."""

    port: int
    target: tuple[str, int]
    hold: str = ""
    """"commit" or "abort": which EndTxn is held; "" forwards everything."""
    delivered: int = 0
    _held: _Held | None = None
    _awaited: socket.socket | None = None
    _answered: threading.Event = field(default_factory=threading.Event)
    _produces: int = 0
    _pending: dict[tuple[int, int], int] = field(default_factory=dict)
    """(connection, correlation id) of a request -> its API key, for those whose answers matter."""
    _added: threading.Event = field(default_factory=threading.Event)
    _last_answer: float = 0.0
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _listener: socket.socket | None = None

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
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
        with contextlib.suppress(OSError):
            while (frame := read_frame(client)) is not None:
                if self._request(frame, client, server):
                    return
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _answers(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (frame := read_frame(server)) is not None:
                if server is self._awaited:
                    self._answered.set()
                self._note_answer(frame, client)
                client.sendall(frame)
        with contextlib.suppress(OSError):
            client.close()

    def _note_answer(self, frame: bytes, client: socket.socket) -> None:
        with self._lock:
            key = self._pending.pop((id(client), struct.unpack_from(">i", frame, 4)[0]), None)
        if key == PRODUCE:
            self._last_answer = clock.monotonic()
        elif key == ADD_PARTITIONS and frame.endswith(b"\0\0"):
            # Ends with the last partition's error code; a transaction still being ended makes the client ask again.
            self._added.set()

    def _request(self, frame: bytes, client: socket.socket, server: socket.socket) -> bool:
        """Forward a request; True when it was held instead and this connection is over."""
        key, version, correlation = struct.unpack_from(">hhi", frame, 4)
        if key == END_TXN:
            if self._take(frame, client, server):
                return True
            self._added.clear()
            self._produces = 0
        elif key == PRODUCE or (key == ADD_PARTITIONS and version < _BROKERS_OWN):
            self._produces += key == PRODUCE
            if self._held is not None and self._is_the_moment(key):
                self._wait_for_quiet()
                self._deliver()
            with self._lock:
                self._pending[id(client), correlation] = key
        server.sendall(frame)
        return False

    def _is_the_moment(self, key: int) -> bool:
        """In the client's next transaction, when some of its records are in and more are to come.

        A late abort does most harm before the transaction gets further partitions, since those open a fresh one; a
        late commit before further records for partitions that the client believes are part of it.
        """
        if self.hold == "abort":
            return key == ADD_PARTITIONS and self._added.is_set()
        return key == PRODUCE and self._produces == 2

    def _wait_for_quiet(self) -> None:
        """Until what the client has produced so far is in the broker's log."""
        deadline = clock.monotonic() + _PATIENCE
        while clock.monotonic() < deadline:
            with self._lock:
                unanswered = PRODUCE in self._pending.values()
            if self._produces and not unanswered and clock.monotonic() - self._last_answer > _QUIET:
                return
            clock.sleep(0.005)

    def _take(self, frame: bytes, client: socket.socket, server: socket.socket) -> bool:
        committed = bool(frame[-1])
        with self._lock:
            if self.hold != ("commit" if committed else "abort") or self._held is not None:
                return False
            self._held = _Held(server, frame)
        client.shutdown(socket.SHUT_RDWR)
        return True

    def _deliver(self) -> None:
        with self._lock:
            held, self._held = self._held, None
        if held is None:
            return
        self._awaited = held.server
        held.server.sendall(held.frame)
        self._answered.wait(_PATIENCE)
        self._answered.clear()
        self.delivered += 1


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
