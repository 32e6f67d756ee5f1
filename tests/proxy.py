"""A TCP proxy that cuts a connection at a chosen moment of the conversation."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from tests.listener import hang_up

Moment = Literal["before", "after"]

COMMIT = b"COMMIT\0"
"""How a COMMIT ends in PostgreSQL's simple and extended query messages alike."""


class Proxy:
    """Forwards every connection to one server; armed, it cuts the next connection whose client says `trigger`."""

    def __init__(self, host: str, port: int, *, trigger: bytes = COMMIT) -> None:
        self._server = (host, port)
        self._trigger = trigger
        self._armed: Moment | None = None
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts = 0
        self._spawn(self._accept)

    def arm(self, moment: Moment) -> None:
        """Cut at the next trigger: "before" the server has seen it, or "after" it has answered; only once."""
        with self._lock:
            self._armed = moment

    def close(self) -> None:
        hang_up(self._listener)  # a close alone would let a waiting accept go on
        for one in self._sockets:
            hang_up(one)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return None  # closed
            if self._listener.fileno() < 0:
                return hang_up(client)
            server = socket.create_connection(self._server)
            self._sockets += (client, server)
            answered = threading.Event()
            self._spawn(lambda c=client, s=server, a=answered: self._forward(c, s, a, listening=True))
            self._spawn(lambda c=client, s=server, a=answered: self._forward(s, c, a, listening=False))

    def _forward(self, source: socket.socket, target: socket.socket, cut: threading.Event, *, listening: bool) -> None:
        """Copy until either side hangs up. `cut` is set once nothing may reach the client any more."""
        with suppress(OSError):
            while data := source.recv(65536):
                moment = self._triggered(data) if listening else None
                if moment == "before":
                    break
                if moment == "after":
                    cut.set()
                if not listening and cut.is_set():
                    break  # the answer is here: the server has done it
                target.sendall(data)
        hang_up(source)
        hang_up(target)

    def _triggered(self, data: bytes) -> Moment | None:
        with self._lock:
            if self._armed is None or self._trigger not in data:
                return None
            moment, self._armed = self._armed, None
            self.cuts += 1
            return moment

    def _spawn(self, run: Callable[[], None]) -> None:
        threading.Thread(target=run, daemon=True).start()


@contextmanager
def proxy_to(host: str, port: int) -> Iterator[Proxy]:
    proxy = Proxy(host, port)
    try:
        yield proxy
    finally:
        proxy.close()
