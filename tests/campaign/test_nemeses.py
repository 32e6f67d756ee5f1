"""What is done to a run's network, asked without one; a run in which too much is deleted, which must show; the judge of
a lost tail.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from confluent_kafka import TopicPartition
from sqlalchemy import Engine

from tests.campaign import ledger_rules as rules
from tests.campaign.checker import by_invariant
from tests.campaign.full_load import Load
from tests.campaign.full_nursery import Zygote
from tests.campaign.full_places import template_database
from tests.campaign.full_world import Plan, World
from tests.campaign.history import History
from tests.campaign.ledger import Account, Effect, Place, Read, Snapshot
from tests.campaign.ledger_reading import Tail, log_ends
from tests.campaign.nemeses_network import KINDS, LateByChance
from tests.campaign.promotions_check import judge
from tests.conftest import Addresses
from tests.processes import eventually
from tests.protocol_proxy import ADD_PARTITIONS, END_TXN, INIT_PRODUCER, PRODUCE, TXN_OFFSETS, Request

OURS = "eo.relay.x.0"
ITEMS = [n for n in range(100) if not rules.poison("book", n)]
_TAIL = {"EndTxn commit": b"\1\0", "EndTxn abort": b"\0\0"}
_KEYS = {"EndTxn commit": END_TXN, "EndTxn abort": END_TXN, "TxnOffsetCommit": TXN_OFFSETS, "Produce": PRODUCE}


def request(key: int, *, by: str = OURS, tail: bytes = b"\1\0") -> Request:
    """As librdkafka sends it: flexible versions but for AddPartitionsToTxn, whose later ones are the brokers' own."""
    name = by.encode()
    version = {PRODUCE: 10, INIT_PRODUCER: 4, ADD_PARTITIONS: 0}.get(key, 3)
    told = struct.pack(">h", len(name)) if key == ADD_PARTITIONS else b"\0" + bytes([len(name) + 1])
    body = struct.pack(">hhih", key, version, 7, 2) + b"rd" + told + name + tail
    return Request.parse(struct.pack(">i", len(body)) + body)


def taken(rule: LateByChance) -> str:
    """The kind of the next request that is held."""
    found: list[str] = []

    def offered() -> bool:
        assert not rule.takes(request(END_TXN, by="entries.ghosts")), "the harness' own"
        found.extend(kind for kind in KINDS if rule.takes(request(_KEYS[kind], tail=_TAIL.get(kind, b"\0\0"))))
        return bool(found)

    eventually(offered, "a request is held", seconds=5)
    return found[0]


def test_a_late_request_comes_in_the_next_transaction() -> None:
    """Not within its own, and at the latest before the next one's end; every kind comes by, and is named."""
    rule, kinds = LateByChance("1:1"), set()
    rule.resting = False
    for _ in range(30):
        kinds.add(taken(rule))
        of_its_own = [request(PRODUCE), request(END_TXN)]
        for again in of_its_own:
            assert not rule.due(again)
            rule.passed(again)
        came = False
        for following in (request(ADD_PARTITIONS), request(PRODUCE), request(PRODUCE), request(END_TXN)):
            came = came or rule.due(following)
            rule.passed(following)
        assert came
    assert kinds == set(KINDS)


class Careless(World):
    """While nobody runs, entries are sent and deleted."""

    def _drain(self, engine: Engine, history: History, tail: Tail) -> float | None:
        self._end_everything()
        servers, topic = self.addresses.bootstrap_servers, f"{self.name}.entries"
        load = Load(servers, topic, history, random.Random(1), keys=3)
        load.sent = 1_000_000
        load.send(30)
        load.finish()
        ends = log_ends(self._admin, [topic], 0)
        self._archive.keep({("entries", partition): end for (_, partition), end in ends.items()})
        asked = [TopicPartition(*place, end) for place, end in ends.items()]
        for future in self._admin.delete_records(asked).values():
            future.result(20)
        return super()._drain(engine, history, tail)

    def _is_drained(self, engine: Engine, tail: Tail) -> bool:
        # What is not there any more cannot be asked for.
        return False


def test_a_run_whose_records_are_deleted_too_early_does_not_pass(services: Addresses, tmp_path: Path) -> None:
    """What is seen when retention takes records that nobody has processed: the workers stop, none goes on behind them.
    Without the deletion the same plan ends with no violation.
    """
    plan = Plan("past", kills=2, longest=8, roles=("book",), gentle=True, upkeep=True, patience=3)
    name = f"campaign_{tmp_path.parent.name.replace('-', '_')}_past"
    with template_database(services, name) as template, Zygote() as zygote:
        result = Careless(services, template, zygote, tmp_path, plan).run()
    found = by_invariant(result.violations)
    assert {"I1", "I10"} <= found.keys(), found
    assert result.tally.exits["exit 70"]


def lost_tail(effects: Sequence[int], *, balance: int | None = None) -> Snapshot:
    """A partition of six entries, the database at 4 and the group at 5; these had their effects."""
    reads = tuple(Read(0, n, "k", f"id{n}", ITEMS[n]) for n in range(6))
    amounts = [rules.amount("book", ITEMS[n]) for n in effects]
    return Snapshot(
        committed={"entries": reads},
        effects=tuple(
            Effect("book", 0, n, f"id{n}", "k", ITEMS[n], amount, n) for n, amount in zip(effects, amounts, strict=True)
        ),
        accounts={("book", "k"): Account(balance or sum(amounts), tuple(ITEMS[n] for n in effects))},
        positions={("book", 0): 4},
        group_offsets={("book", 0): 5},
    )


@pytest.mark.parametrize(
    ("snapshot", "told", "lost", "wrong"),
    [
        (lost_tail([0, 1, 2, 3]), {("book", 0): (6, 4)}, 2, 0),
        (lost_tail([0, 1, 2, 3]), {("book", 0): (5, 4)}, 1, 0),
        (lost_tail([0, 1, 2, 3]), {}, 0, 2),
        (lost_tail([0, 1, 2, 3]), {("book", 0): (6, 3)}, 2, 1),
        (lost_tail([0, 1, 2, 3, 5]), {("book", 0): (6, 4)}, 2, 2),
        (lost_tail([0, 2, 3]), {("book", 0): (6, 4)}, 2, 2),
        (lost_tail([0, 1, 2, 3, 3]), {("book", 0): (6, 4)}, 2, 2),
        (lost_tail([0, 1, 2, 3], balance=1), {("book", 0): (6, 4)}, 2, 1),
    ],
)
def test_what_a_new_primary_lacks_is_compared_with_what_was_told(
    snapshot: Snapshot, told: dict[Place, tuple[int, int]], lost: int, wrong: int
) -> None:
    """Told to the offset and nothing else amiss; not told; told wrongly; and what is there is not what it should be."""
    found, violations = judge(snapshot, told, [])
    assert (found, len(violations)) == (lost, wrong), violations


@pytest.mark.parametrize("by", ["eo.relay.x.0", "x" * 300])
def test_a_transactional_id_is_read_off_any_request(by: str) -> None:
    """Long ones too, whose length takes two bytes."""
    length = len(by) + 1
    told = bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])
    body = struct.pack(">hhih", END_TXN, 3, 7, -1) + b"\0" + told + by.encode() + b"\1\0"
    assert Request.parse(struct.pack(">i", len(body)) + body).transactional_id == by
    assert request(PRODUCE, by=OURS).transactional_id == request(ADD_PARTITIONS, by=OURS).transactional_id == OURS
