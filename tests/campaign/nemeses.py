"""What is done to the processes of a run, drawn from its seed: the same seed, the same faults in the same order.

A life is one process of a slot, from its start to its end, and what happens to it. What a fault hits still depends on
the moment; which fault it is does not.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from eoframework.crashtest import points as table

Role = Literal["book", "settle", "crumble", "relay"]
Kind = Literal["point", "moment", "term", "pause", "freeze", "raise"]
_CONSUMERS: tuple[Role, ...] = ("book", "settle")
_FLOWS: dict[Role, tuple[str, ...]] = {
    "book": ("consume", "failure"),
    "settle": ("consume", "failure"),
    "crumble": ("transform",),
    "relay": ("relay",),
}
# Once in a life, or only in few lives: told when somebody else did something at the right moment.
ONCE = frozenset(
    [
        "consume.registered",
        "consume.claiming",
        "kafka.producer.opening",
        "kafka.producer.ready",
        "transform.registered",
        "transform.planned",
        "transform.claimed",
        "transform.begun",
        "relay.claimed",
        "relay.bound",
        "relay.recovered",
        "consume.charged",
        "consume.revoked",
        "consume.released",
        "relay.released",
    ]
)
WHEN_ASKED_TO_END = frozenset({"consume.revoked", "consume.released", "relay.released"})
"""Passed by a process that ends in order, or gives something up."""
RARE = frozenset(
    [
        "consume.holder_terminated",
        "consume.fenced",
        "kafka.loss_guarded",
        "kafka.offset_marked",
        "relay.made_due",
        "relay.bound",
        "kafka.transaction.aborted",
        "kafka.producer.replaced",
        "relay.refused",
        "relay.dead_lettered",
        "relay.topic_paused",
        "transform.given_way",
        "transform.planned",
        "transform.begun",
    ]
)
"""Not drawn unless they are named: a life would end before it came by. Other parts of the campaign pass them."""
HOUR = 3600.0
LONGEST_LIFE = 7.0


@dataclass(frozen=True, slots=True)
class Fate:
    """What happens to one process."""

    kind: Kind
    point: str = ""
    nth: int = 1
    soon: bool = False
    """A moment after the point, while the call that follows is under way."""
    after: float = LONGEST_LIFE
    """Seconds from its start: a `moment`, `term` or `pause` comes then; a process that meets no `point` is killed."""
    lasting: float = 0.0
    """Seconds that it stands still, before it goes on as a zombie."""
    clock: float = 0.0
    """Seconds by which its wall clock is wrong."""

    def __str__(self) -> str:
        where = f" {self.at}" if self.point else f" after {self.after:.2f} s"
        lasting = f" for {self.lasting:.2f} s" if self.lasting else ""
        return f"{self.kind}{where}{lasting}{f', clock {self.clock:+.0f} s' if self.clock else ''}"

    @property
    def at(self) -> str:
        return f"{self.point}{'+' if self.soon else ''}:{self.nth}"

    @property
    def nudged(self) -> bool:
        """Whether it has to be asked to end for its point to come by."""
        return self.point in WHEN_ASKED_TO_END

    def environment(self, mark: str) -> dict[str, str]:
        """What the process is told."""
        told = {
            "point": {"EO_CRASH_AT": self.at},
            "freeze": {"EO_FREEZE_AT": f"{self.point}:{self.nth}", "EO_FREEZE_MARK": mark},
            "raise": {"CAMPAIGN_RAISE_AT": f"{self.point}:{self.nth}"},
        }.get(self.kind, {})
        return {**told, **({"CAMPAIGN_CLOCK": str(self.clock)} if self.clock else {})}


PEACE = Fate("moment", after=float("inf"))


@cache
def points_of(role: Role, *, rare: bool = False) -> tuple[str, ...]:
    """The names at which a process of this role can be killed."""
    names = dict.fromkeys(boundary.name for flow in _FLOWS[role] for boundary in table.of(flow))
    return tuple(name for name in names if rare or name not in RARE)


def flow_of(role: Role) -> str:
    """Under which flow its kills are counted."""
    return "consume" if role in _CONSUMERS else "transform" if role == "crumble" else role


def lives(
    seed: str, role: Role, *, only: Collection[str] = (), gentle: bool = False, long: bool = False
) -> Iterator[Fate]:
    """What happens to one slot's processes, one after the other, for ever; `gentle`: nothing but crash points; `long`:
    most are left alone for seconds, so that what is done to the services meets them at work.
    """
    chance = random.Random(seed)
    names = [name for name in points_of(role, rare=bool(only)) if not only or name in only] or list(points_of(role))
    while True:
        fate = _point(chance, names)
        other = chance.random()
        if not gentle:
            fate = _other(chance, fate, other)
        if long and chance.random() < 0.75:
            fate = Fate("moment", after=chance.uniform(5.0, 15.0))
        yield replace(fate, clock=chance.choice((-HOUR, HOUR))) if not gentle and chance.random() < 0.05 else fate


def pairs_of_lives(seed: str, role: Role, pairs: Sequence[tuple[str, str]]) -> Iterator[Fate]:
    """Each pair in turn: a kill at the first point, and at the second in the process that is started then."""
    chance = random.Random(seed)
    while True:
        for first, second in chance.sample(pairs, len(pairs)):
            yield Fate("point", first, nth=1, after=_patience(chance, first))
            yield Fate("point", second, nth=1, after=_patience(chance, second))


def _point(chance: random.Random, names: Sequence[str]) -> Fate:
    name = chance.choice(names)
    nth = 1 if name in ONCE else chance.choice((1, 1, 1, 2, 3, 5))
    return Fate("point", name, nth, soon=chance.random() < 0.35, after=_patience(chance, name))


def _patience(chance: random.Random, name: str) -> float:
    return chance.uniform(0.8, 1.6) if name in WHEN_ASKED_TO_END else LONGEST_LIFE


def _other(chance: random.Random, fate: Fate, dice: float) -> Fate:
    """In a fourth of all lives something else than a kill at a point."""
    if dice < 0.06:
        return Fate("moment", after=chance.uniform(0.1, 2.5))
    if dice < 0.11:
        return Fate("term", after=chance.uniform(0.1, 2.0))
    if dice < 0.16:
        return Fate("pause", after=chance.uniform(0.3, 1.5), lasting=_standstill(chance))
    if dice < 0.21:
        return replace(fate, kind="freeze", soon=False, after=LONGEST_LIFE, lasting=_standstill(chance))
    if dice < 0.25:
        return replace(fate, kind="raise", soon=False)
    return fate


def _standstill(chance: random.Random) -> float:
    # Below and above: session 3 s, the transaction time-outs 2.5 and 5 s, the lease 1 s.
    return chance.choice((0.3, 0.7, 1.5, 2.7, 3.5, 6.0)) * chance.uniform(0.9, 1.1)
