"""A proxy that reads Kafka's protocol and hides the broker behind it.

Clients ask the broker where it is. Its answers are changed so that it is here, so any broker that advertises the
address it is reached by will do, and whoever wants one has a proxy of their own.
"""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass, field

from tests.listener import Listener, Moment, hang_up
from tests.protocol_proxy import Request, read_frame

_METADATA, _FIND_COORDINATOR, _DESCRIBE_CLUSTER = 3, 10, 60
_WHERE = frozenset({_METADATA, _FIND_COORDINATOR, _DESCRIBE_CLUSTER})
"""Requests whose answers say where brokers are."""


@dataclass
class _Line:
    """One client's connection and the one behind it."""

    client: socket.socket
    server: socket.socket
    asked: dict[int, int] = field(default_factory=dict)
    """Correlation id -> API key, of requests that are not answered yet."""
    last: int | None = None
    """The correlation id of the request with whose answer this connection ends."""


class KafkaProxy(Listener):
    """Forwards every connection to one broker; what `asked` and `answered` say is done with requests and answers."""

    def __init__(self, broker: tuple[str, int]) -> None:
        self._broker = broker
        super().__init__()
        host = broker[0].encode()
        self._there = host + struct.pack(">i", broker[1])
        self._here = host + struct.pack(">i", self.port)

    @property
    def address(self) -> str:
        """What clients are told as the broker's address."""
        return f"{self._broker[0]}:{self.port}"

    def asked(self, request: Request) -> Moment | None:
        """When the connection is cut at this request; None: it passes."""
        return None

    def answered(self, key: int) -> None:
        """An answer to a request of this API key is about to be passed on; it is, when this returns."""

    def serve(self, client: socket.socket) -> None:
        try:
            line = _Line(client, self.connected(client, self._broker))
        except OSError:
            client.close()
            return
        threading.Thread(target=self._answers, args=(line,), daemon=True).start()
        with suppress(OSError, ValueError):  # either side has hung up
            while (frame := read_frame(client)) is not None:
                request = Request.parse(frame)
                moment = self.asked(request)
                if moment == "before":
                    break
                line.asked[request.correlation] = request.key
                if moment is not None:
                    line.last = request.correlation
                line.server.sendall(frame)
                if moment == "during":
                    # The broker's side stays open until it has answered: it is to hear this one, and not a reset.
                    hang_up(client)
                    return
        self.gone(line.client, line.server)

    def _answers(self, line: _Line) -> None:
        with suppress(OSError):  # either side has hung up
            while (frame := read_frame(line.server)) is not None:
                (correlation,) = struct.unpack_from(">i", frame, 4)
                if correlation == line.last:
                    break
                key = line.asked.pop(correlation)
                if key in _WHERE:
                    frame = frame.replace(self._there, self._here)
                self.answered(key)
                line.client.sendall(frame)
        self.gone(line.client, line.server)
