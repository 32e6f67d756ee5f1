"""A TCP proxy that cuts a connection at a chosen moment of the conversation."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from tests import listener
from tests.listener import Listener, hang_up

Moment = Literal["before", "after"]
"""When a connection is cut: before the server has seen the trigger, or when it has answered it."""

COMMIT = b"COMMIT\0"
"""How a COMMIT ends in PostgreSQL's simple and extended query messages alike."""

Hearing = Callable[[bytes], listener.Moment | None]
"""Told each piece that a client says: when its connection is cut at it; None: it passes."""


class BytesProxy(Listener):
    """Forwards every connection to one server, byte for byte, and cuts it when the `hearing` of it says so."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        super().__init__()

    def hearing(self) -> Hearing:
        """Asked for each connection."""
        raise NotImplementedError

    def serve(self, client: socket.socket) -> None:
        try:
            server = self.connected(client, self._server)
        except OSError:
            client.close()
            return
        cut = threading.Event()
        threading.Thread(target=self._answers, args=(client, server, cut), daemon=True).start()
        hear = self.hearing()
        with suppress(OSError):  # either side has hung up
            while data := client.recv(65536):
                moment = hear(data)
                if moment == "before":
                    break
                if moment is not None:
                    cut.set()
                server.sendall(data)
                if moment == "during":
                    # The server's side stays open until it has answered: it is to hear this one, and not a reset.
                    hang_up(client)
                    return
        self.gone(client, server)

    def _answers(self, client: socket.socket, server: socket.socket, cut: threading.Event) -> None:
        """Passes on what the server says, until `cut` is set: then its next answer, which shows that it has done it."""
        with suppress(OSError):  # either side has hung up
            while (data := server.recv(65536)) and not cut.is_set():
                client.sendall(data)
        self.gone(client, server)


class Proxy(BytesProxy):
    """Armed, it cuts the next connection whose client says `trigger`."""

    def __init__(self, host: str, port: int, *, trigger: bytes = COMMIT) -> None:
        self._trigger = trigger
        self._armed: Moment | None = None
        self._arming = threading.Lock()
        self.cuts = 0
        super().__init__((host, port))

    def arm(self, moment: Moment) -> None:
        """Cut at the next trigger; only once."""
        with self._arming:
            self._armed = moment

    def hearing(self) -> Hearing:
        return self._triggered

    def _triggered(self, data: bytes) -> Moment | None:
        with self._arming:
            if self._armed is None or self._trigger not in data:
                return None
            moment, self._armed = self._armed, None
            self.cuts += 1
            return moment


@contextmanager
def proxy_to(host: str, port: int) -> Iterator[Proxy]:
    proxy = Proxy(host, port)
    try:
        yield proxy
    finally:
        proxy.close()
