"""What every proxy of the tests stands on: a port that serves each connection on a thread of its own."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Literal

Moment = Literal["before", "during", "after"]
"""When a call is cut: before the server has seen it; when it has, and nobody has waited for its answer; when it has
answered."""


def hang_up(one: socket.socket) -> None:
    """End a connection now, whoever waits at it."""
    with suppress(OSError):  # the other direction was first
        one.shutdown(socket.SHUT_RDWR)
    one.close()


class Listener:
    """Hands each connection that comes to `serve`, on a thread of its own."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def connected(self, client: socket.socket, server: tuple[str, int]) -> socket.socket:
        """The connection to the server behind; both are hung up when this proxy is closed."""
        behind = socket.create_connection(server)
        for side in (client, behind):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open |= {client, behind}
        return behind

    def gone(self, *sides: socket.socket) -> None:
        for side in sides:
            hang_up(side)
        with self._lock:
            self._open.difference_update(sides)

    def close(self) -> None:
        hang_up(self._listener)  # a close alone would let a waiting accept go on
        with self._lock:
            left = set(self._open)
        self.gone(*left)

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()
