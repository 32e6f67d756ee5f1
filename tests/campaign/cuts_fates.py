"""Which call is cut and when, drawn from a seed; and what was cut, counted."""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

Moment = Literal["before", "during", "after"]
"""Before the server has seen the call; when it has, and nobody has waited for its answer; when it has answered."""

Call = Literal["COMMIT", "EndTxn"]
CALLS: tuple[Call, ...] = ("COMMIT", "EndTxn")
MOMENTS: tuple[Moment, ...] = ("before", "during", "after")

_IN_A_ROW = 3
_SELDOM = 0.1
_GIVE_UP = 0.15


@dataclass
class Tally:
    """What was cut in a round."""

    kinds: Counter[str] = field(default_factory=Counter)
    """"cut COMMIT before" -> how often."""
    places: Counter[str] = field(default_factory=Counter)
    """Of what the call was the end."""

    def cuts(self, call: Call) -> int:
        return cuts(self.kinds, call)


class Fates:
    """Asked at each call by the proxies, from their threads. The same seed draws the same fates in the same order."""

    def __init__(self, seed: str, *, shares: dict[Call, float]) -> None:
        """`shares`: how many of the calls that end something of the application's are cut."""
        self.tally = Tally()
        self._shares = shares
        self._random = {call: random.Random(f"{seed} {call}") for call in CALLS}
        self._row: Counter[str] = Counter()
        self._last: dict[str, Moment | None] = {}
        self._lock = threading.Lock()

    def draw(self, call: Call, what: str, *, seldom: bool = False) -> Moment | None:
        """When this call is cut; None: it passes. `seldom`: what is done between the application's own calls."""
        with self._lock:
            dice = self._random[call]
            share = self._shares[call] * (_SELDOM if seldom else 1.0)
            hit, moment = dice.random() < share, dice.choice(MOMENTS)
            # Whatever the dice say, something gets through: a round has to end.
            if not hit or self._row[what] >= _IN_A_ROW:
                self._row[what] = 0
                self._last[what] = None
                return None
            self._row[what] += 1
            self._last[what] = moment
            self.tally.kinds[f"cut {call} {moment}"] += 1
            self.tally.places[f"{call} of {what}"] += 1
            return moment

    def gives_up(self) -> bool:
        """Whether the client of a call just cut is to hear nothing more, until it gives up by itself."""
        with self._lock:
            given_up = self._random["EndTxn"].random() < _GIVE_UP
            self.tally.places["EndTxn whose client heard nothing until it gave up"] += given_up
            return given_up

    def last(self, what: str) -> Moment | None:
        """What became of the last call of this kind: for who makes them one after the other."""
        with self._lock:
            return self._last.get(what)


def cuts(kinds: dict[str, int] | Counter[str], call: Call) -> int:
    """How many of this call."""
    return sum(count for kind, count in kinds.items() if kind.startswith(f"cut {call} "))


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
