"""What a network does to Kafka transactions: single requests come late, in a later transaction of the same producer.

The broker advertises a proxy's port. Which request is late, and the moment at which it comes, is drawn from the seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from eoframework import clock, dev
from eoframework.dev import processes
from tests.protocol_proxy import (
    ADD_OFFSETS,
    ADD_PARTITIONS,
    END_TXN,
    INIT_PRODUCER,
    PRODUCE,
    TXN_OFFSETS,
    ProtocolProxy,
    Request,
)

KINDS = ("EndTxn commit", "EndTxn abort", "TxnOffsetCommit", "Produce")
_OURS = "eo."
"""What the framework's transactional ids begin with; the harness' own has no protection to show."""
_MOMENTS = {
    "a new producer": INIT_PRODUCER,
    "its first request": ADD_PARTITIONS,
    "further records": PRODUCE,
    "the group": ADD_OFFSETS,
    "its offsets": TXN_OFFSETS,
    "its end": END_TXN,
}
_WANTED_FOR = 3.0
"""Seconds after which another kind is drawn: aborts are rare."""
_LONGEST = 12.0
"""Seconds after which a request arrives whoever is doing what: its producer may never come back."""


class LateByChance:
    """One request at a time: its kind is drawn, then the moment, in the next transaction, just before which it comes.

    At the latest that is the next transaction's end; "a new producer" is that of the process which follows a dead one.
    """

    def __init__(self, seed: str) -> None:
        self._chance = random.Random(f"{seed} network")
        self.resting = True
        self._from = 0.0
        self._id: str | None = None
        self._draw()

    def takes(self, request: Request) -> bool:
        """Of the framework's own requests, the next one of the kind that was drawn."""
        now = clock.monotonic()
        if self.resting or now < self._from or not _ours(request):
            return False
        if now > self._from + _WANTED_FOR:
            self._kind = self._chance.choice(KINDS)
            self._from = now
        if request.what != self._kind:
            return False
        self._id, self._until, self._ends = request.transactional_id, now + _LONGEST, 0
        self._produces = 0
        return True

    def due(self, request: Request) -> bool:
        """Also when it was held for so long that its producer will hardly come back."""
        if clock.monotonic() > self._until:
            self._draw()
            return True
        if request.transactional_id != self._id or not self._is_the_moment(request):
            return False
        self._draw()
        return True

    def _is_the_moment(self, request: Request) -> bool:
        if request.key == INIT_PRODUCER and self._moment == INIT_PRODUCER:
            return True
        if not self._ends:
            return False
        if self._moment == PRODUCE and request.key == PRODUCE:
            return self._produces > 0
        return request.key in (self._moment, END_TXN)

    def passed(self, request: Request) -> None:
        """Follow the producer whose request is held: what is sent again still belongs to the same transaction."""
        if request.transactional_id != self._id:
            return
        if request.key in (END_TXN, INIT_PRODUCER):
            self._ends, self._produces = self._ends + 1, 0
        self._produces += request.key == PRODUCE

    def answered(self, key: int, frame: bytes) -> None:
        """Nothing to learn from it."""

    def _draw(self) -> None:
        self._kind = self._chance.choice(KINDS)
        self._moment = _MOMENTS[self._chance.choice(list(_MOMENTS))]
        self._from = clock.monotonic() + self._chance.uniform(0.0, 0.6)
        self._until = float("inf")
        self._id = None
        self._ends = self._produces = 0


def _ours(request: Request) -> bool:
    return (request.transactional_id or "").startswith(_OURS)


class LateRequests:
    """The nemesis of one run, at a proxy that many runs use one after the other."""

    def __init__(self, proxy: ProtocolProxy, seed: str) -> None:
        self._proxy, self._rule = proxy, LateByChance(seed)
        self._seen = len(proxy.came)
        self.answers: Counter[str] = Counter()
        """What the broker said to them."""

    def __call__(self, seconds: float, counts: Counter[str]) -> None:
        """Called now and then while faults last: begin, and count what has come late since."""
        if self._rule.resting:
            self._rule.resting = False
            self._proxy.make_late(self._rule)
        self._count(counts)

    def rest(self, counts: Counter[str]) -> None:
        """No other request is held; the one that is arrives as planned, while all is drained."""
        self._rule.resting = True
        self._count(counts)

    def end(self, counts: Counter[str]) -> None:
        """Whatever is still held never arrives."""
        self._proxy.make_late(None)
        self._count(counts)

    def _count(self, counts: Counter[str]) -> None:
        while self._seen < len(self._proxy.came):
            what, answer = self._proxy.came[self._seen]
            counts[f"late {what}"] += 1
            self.answers[f"{what}: {answer}"] += 1
            self._seen += 1


@contextmanager
def proxy_of_all_clients() -> Iterator[tuple[ProtocolProxy, dev.KafkaOptions]]:
    """A proxy, and the options of the broker that it stands before; every client of that broker goes through it."""
    port = processes.free_port()
    proxy = ProtocolProxy(processes.free_port(avoid=[port]), ("127.0.0.1", port))
    proxy.start()
    try:
        properties = {"advertised.listeners": f"PLAINTEXT://127.0.0.1:{proxy.port}"}
        yield proxy, dev.KafkaOptions(port=port, properties=properties)
    finally:
        proxy.close()
