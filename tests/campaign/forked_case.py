"""What one cycle of the forked campaign is about: the messages, what becomes of each, and where processes are killed.

All of it follows from a flow's name and a seed, so a cycle is replayed from its name: `FLOW/SEED/KILL,KILL`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from eoframework.cloudevents import incoming_id
from eoframework.external import Unresolved
from eoframework.message import Record
from eoframework.retry import AfterDead, Ordering

TOPIC, OUT = "forked", "forked.out"
ATTEMPTS = 2
EVER = 1_000_000
ANY = "*"
WRITTEN = 9
"""Stands for the partition in what the application publishes by itself."""
Place = tuple[int, int]
Fails = Literal[
    "never", "raises", "sql", "later", "rejects", "undecodable", "kills", "refused", "late", "undone", "breaks"
]
"""`kills`: its handler ends the process. `refused`: Kafka takes what is published for it only after it was healed.
`late`: what is published for it is delayed. Of calls outside, `undone`: surely not made; `breaks`: made, no answer."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One delivery, and what becomes of it: it fails at its first `times` attempts."""

    partition: int
    offset: int
    key: bytes | None
    name: str | None
    """Its message id; the same again is a duplicate."""
    amount: int
    fails: Fails = "never"
    times: int = 0

    @property
    def place(self) -> Place:
        return self.partition, self.offset

    def record(self) -> Record:
        body = b'{"p": %d, "o": %d, "amount": %d}' % (self.partition, self.offset, self.amount)
        value = b"\xff" if self.fails == "undecodable" else body
        headers = (("message-id", self.name.encode()),) if self.name else ()
        return Record(TOPIC, self.partition, self.offset, self.key, value, headers, 0)

    @property
    def identity(self) -> object:
        """What a duplicate is recognised by; a message without an id is only itself."""
        return incoming_id(self.record().headers, topic=TOPIC) or self.place


@dataclass(frozen=True, slots=True)
class Flow:
    """Which of our code runs in a cycle, and how the handler is declared."""

    name: str
    fails: tuple[tuple[Fails, int], ...] = (("never", 0),)
    """What its messages are drawn from, and in this order in the case of seed 0."""
    batch: bool = False
    ordering: Ordering = "key"
    after_dead: AfterDead = "continue"
    dead_letter_topic: bool = False
    external: Unresolved | None = None
    operator: bool = False
    """Dead letters, of handlers and of the outbox, are decided about: those at even offsets again, the others gone."""
    relays: bool = False
    relay_after_dead: AfterDead = "continue"
    prunes: bool = False
    reprocesses: bool = False
    writes: int = 0
    """Transactions of the application's own that publish."""
    messages: int = 7
    pause: float = 0.0
    """Seconds between attempts. What waits longer is tried when all that has come is done with, so others come
    behind it; with none, at once."""


_OK: tuple[Fails, int] = ("never", 0)
_FAILING: tuple[tuple[Fails, int], ...] = (
    *(_OK, ("raises", 1), _OK, ("rejects", EVER), ("raises", EVER), ("sql", 1), ("undecodable", 0), ("later", 1)),
)
_WAITING: tuple[tuple[Fails, int], ...] = (
    *(("raises", 1), ("later", 1), _OK, _OK, ("raises", EVER), _OK, ("rejects", EVER), _OK),
)
_ONCE_DEADLY: tuple[tuple[Fails, int], ...] = (_OK, _OK, ("raises", 1), ("kills", 1), _OK, ("raises", EVER))
FLOWS = {
    flow.name: flow
    for flow in (
        Flow("consume"),
        Flow("batch", (_OK, _OK, ("raises", 1), _OK, ("rejects", EVER), ("sql", 1)), batch=True),
        Flow("failure", _FAILING, dead_letter_topic=True),
        Flow("waiting", _WAITING, dead_letter_topic=True, messages=8, pause=60),
        Flow("charged", _ONCE_DEADLY),
        Flow("deadly", (_OK, ("kills", EVER), _OK, ("raises", 1)), messages=5),
        Flow("partition", _FAILING, ordering="partition"),
        Flow("hold", _FAILING, after_dead="hold", operator=True, pause=60),
        Flow("replay", (_OK, ("raises", EVER), ("rejects", EVER), _OK, ("undecodable", 0)), operator=True),
        Flow("external-ask", (_OK, _OK, ("raises", 1), ("rejects", EVER)), external="ask", messages=4),
        Flow("external-retry", (_OK, ("raises", 1), _OK), external="retry", messages=4),
        Flow("external-give-up", (_OK, ("raises", 1), _OK), external="give_up", messages=3),
        Flow(
            *("external-resolve", (_OK, ("breaks", 1), ("undone", 1), _OK, ("breaks", 1))),
            **{"external": "ask", "operator": True, "messages": 5},  # type: ignore[arg-type]
        ),
        Flow("prune", prunes=True, messages=6),
        Flow("reprocess", reprocesses=True, messages=6),
        Flow("relay", (_OK, _OK, ("refused", EVER), _OK), relays=True, messages=6),
        Flow("publish", (_OK, ("late", 0), _OK, ("refused", EVER)), relays=True, writes=3, messages=4),
        Flow("outbox", (_OK, ("refused", EVER), _OK, ("refused", EVER)), relays=True, operator=True, messages=6),
        Flow(
            *("outbox-hold", (("refused", EVER), _OK, _OK, ("refused", EVER))),
            **{"relays": True, "operator": True, "relay_after_dead": "hold", "messages": 6},  # type: ignore[arg-type]
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Kill:
    """What happens to one process: at the `nth` event of this name (of any, for `*`) it is killed, or frozen."""

    point: str
    nth: int
    how: Literal["kill", "later", "freeze"] = "kill"
    """`later`: up to 2 ms after it, while the call that follows is under way. `freeze`: stopped there; it goes on when
    its successor has done everything, a zombie."""

    def __str__(self) -> str:
        return f"{self.point}{ {'kill': '', 'later': '+', 'freeze': '!'}[self.how] }:{self.nth}"

    @classmethod
    def parse(cls, text: str) -> Kill:
        name, nth = text.rsplit(":", 1)
        how: Literal["kill", "later", "freeze"] = (
            "later" if name.endswith("+") else "freeze" if name.endswith("!") else "kill"
        )
        return cls(name.rstrip("+!"), int(nth), how)


@dataclass(frozen=True)
class Case:
    """One cycle: its messages, and what is done to its processes in turn; who comes after these ends in peace."""

    flow: Flow
    seed: int
    kills: tuple[Kill, ...] = ()

    def __str__(self) -> str:
        return f"{self.flow.name}/{self.seed}/{','.join(map(str, self.kills))}"

    @classmethod
    def parse(cls, text: str) -> Case:
        name, seed, kills = text.split("/", 2)
        return cls(FLOWS[name], int(seed), tuple(Kill.parse(kill) for kill in kills.split(",") if kill))

    def killed(self, *kills: Kill) -> Case:
        return replace(self, kills=kills)

    @property
    def crashes(self) -> int:
        """How often a message may be in flight at a death: more than we kill, or an innocent would be given up."""
        return len(self.kills) + 2

    @cached_property
    def logs(self) -> dict[int, tuple[Sent, ...]]:
        """The partitions' logs."""
        dice = random.Random(f"{self.flow.name} {self.seed}")
        logs: dict[int, list[Sent]] = {0: [], 1: []}
        for number in range(self.flow.messages):
            self._append(logs, number, dice)
        return {partition: tuple(log) for partition, log in logs.items()}

    def _append(self, logs: dict[int, list[Sent]], number: int, dice: random.Random) -> None:
        every, fixed = self.flow.fails, self.seed == 0
        fails, times = every[number % len(every)] if fixed else dice.choice(every)
        partition = int(number in (1, self.flow.messages - 1)) if fixed else dice.choice((0, 0, 1))
        log = logs[partition]
        named = [sent for sent in log if sent.name]
        duplicate = number == self.flow.messages - 2 if fixed else dice.random() < 0.15
        if duplicate and named and not self.flow.prunes:
            again = dice.choice(named)
            log.append(replace(again, offset=len(log)))
            return
        # Without an id only the position keeps a message from being processed again.
        needs_name = self.flow.reprocesses or self.flow.external is not None
        name = f"{self.seed}-{number}" if needs_name or number % 3 != 2 else None
        key = (b"a", b"b", b"a", b"a", None)[number % 5 if fixed else dice.randrange(5)]
        if fails == "refused" and key is None:
            key = b"a"
        log.append(Sent(partition, len(log), key, name, 1 << number, fails, times))

    @cached_property
    def sent(self) -> dict[Place, Sent]:
        return {sent.place: sent for log in self.logs.values() for sent in log}

    @property
    def may_park(self) -> bool:
        """Whether a message may have to wait for anything."""
        return bool(self.flow.external) or any(
            sent.fails not in ("never", "refused", "late") for sent in self.sent.values()
        )

    @property
    def size(self) -> int:
        """Messages of one batch and partition."""
        return 3 if self.seed == 0 else 1 + self.seed % 4

    def half(self, partition: int) -> int:
        """Where a partition stands when its first ids grow old (`prune`)."""
        return len(self.logs[partition]) // 2


def decision(case: Case, sent: Sent) -> Literal["replay", "discard"]:
    """What an operator does about a dead letter of a handler."""
    again = sent.offset % 2 == 0 or case.flow.external is not None
    return "replay" if again and sent.fails != "undecodable" else "discard"


def random_case(seed: int, cycle: int, flows: tuple[str, ...] = tuple(FLOWS)) -> Case:
    """The `cycle`-th cycle of a campaign with this seed."""
    dice = random.Random(f"{seed}:{cycle}")
    # A run of cycles has one flow: what its processes have in common is warm.
    flow = FLOWS[flows[random.Random(f"{seed} {cycle // 20}").randrange(len(flows))]]
    kills = tuple(_kill(dice) for _ in range(dice.choice((2, 3, 3, 4, 5, 6, 8))))
    if flow.name == "deadly":
        kills = kills[:3]
    if dice.random() < 0.03 and not flow.relays:
        # The others first: a zombie's successor runs to the end.
        kills = (*kills[:1], replace(kills[-1], how="freeze"))
    return Case(flow, dice.randrange(1, 1 << 30), kills)


def _kill(dice: random.Random) -> Kill:
    # Later events are fewer in a process that has less left to do.
    return Kill(ANY, 1 + int(30 * dice.random() ** 2), "later" if dice.random() < 0.3 else "kill")
