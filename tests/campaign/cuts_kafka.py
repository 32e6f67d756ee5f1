"""A proxy that reads Kafka's protocol and cuts the EndTxn that commits a transaction.

Clients ask the broker where it is. Its answers are changed so that it is here, so any broker that advertises the
address it is reached by will do, and each lane has a proxy of its own.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from tests.campaign.cuts_fates import Fates, Listener, Moment, hang_up
from tests.protocol_proxy import ADD_OFFSETS, ADD_PARTITIONS, END_TXN, PRODUCE, Request, read_frame

_METADATA, _FIND_COORDINATOR, _INIT_PRODUCER_ID, _DESCRIBE_CLUSTER = 3, 10, 22, 60
_WHERE = frozenset({_METADATA, _FIND_COORDINATOR, _DESCRIBE_CLUSTER})
"""Requests whose answers say where brokers are."""


@dataclass
class _Line:
    """One client's connection and the one behind it."""

    client: socket.socket
    server: socket.socket
    asked: dict[int, int] = field(default_factory=dict)
    """Correlation id -> API key, of requests whose answers matter."""
    last: int | None = None
    """The correlation id of the EndTxn with whose answer this connection ends."""


class KafkaProxy(Listener):
    """Forwards every connection to one broker, and cuts at EndTxn as `fates` has it."""

    def __init__(self, broker: tuple[str, int]) -> None:
        self.fates: Fates | None = None
        """None: everything passes."""
        self._broker = broker
        self._deaf: set[str] = set()
        """Producers whose EndTxns get no further, until a new one takes their place."""
        self._doubtful: set[str] = set()
        """Producers whose EndTxn was cut: the next one is the same, sent again."""
        self._tainted: set[str] = set()
        """Producers of which an EndTxn may still be under way: the next one's epoch must come first."""
        self.went_on: Counter[str] = Counter()
        """Producers that sent something into another transaction all the same."""
        self._state = threading.Lock()
        super().__init__()
        host = broker[0].encode()
        self._there = host + struct.pack(">i", broker[1])
        self._here = host + struct.pack(">i", self.port)

    @property
    def address(self) -> str:
        """What clients are told as the broker's address."""
        return f"{self._broker[0]}:{self.port}"

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
                moment = self._fate(request)
                if moment == "before":
                    break
                if request.key in _WHERE:
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
                if line.asked.pop(correlation, None) is not None:
                    frame = frame.replace(self._there, self._here)
                line.client.sendall(frame)
        self.gone(line.client, line.server)

    def _fate(self, request: Request) -> Moment | None:
        if request.key not in (END_TXN, _INIT_PRODUCER_ID, PRODUCE, ADD_PARTITIONS, ADD_OFFSETS):
            return None
        who = _client_id(request)
        with self._state:
            if request.key == _INIT_PRODUCER_ID:
                for known in (self._doubtful, self._deaf, self._tainted):
                    known.discard(who)
            if request.key != END_TXN:
                if who in self._tainted:
                    self.went_on[_of(who)] += 1
                return None
            again = who in self._doubtful
            self._doubtful.discard(who)
            if who in self._deaf:
                return "before"
            if self.fates is None or again or not request.commits:
                return None
            moment = self.fates.draw("EndTxn", _of(who))
            if moment is not None:
                self._tainted.add(who)
                (self._deaf if self.fates.gives_up() else self._doubtful).add(who)
            return moment


def _of(client_id: str) -> str:
    return "a transform" if client_id.startswith("eo.transform.") else "the relay"


def _client_id(request: Request) -> str:
    """Which is, of our producers, the transactional id."""
    (size,) = struct.unpack_from(">h", request.frame, 12)
    return request.frame[14 : 14 + max(size, 0)].decode()
