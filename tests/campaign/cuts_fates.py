"""Which call is cut and when, drawn from a seed; and what was cut, counted."""

from __future__ import annotations

import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from tests.listener import Moment

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
