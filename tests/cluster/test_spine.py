"""Worker and relay on three brokers, one of which fails: ledger, outbox and topic agree, nobody lends a hand."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.brokers import Brokers
from tests.cluster.faults import frozen, killed, restarted, through
from tests.cluster.flows import Spine, running

RATE = 100
LONG = 3.5


def test_each_broker_killed(brokers: Brokers, database_url: str, tmp_path: Path) -> None:
    with running(Spine, brokers, database_url, tmp_path, rate=RATE) as flow:
        for node in brokers.nodes:
            through(brokers, flow, killed(node))


def test_rolling_restart(brokers: Brokers, database_url: str, tmp_path: Path) -> None:
    """The controller last: it moves twice, and everything else with it."""
    with running(Spine, brokers, database_url, tmp_path, rate=RATE) as flow:
        last = brokers.controller()
        through(brokers, flow, restarted(*brokers.others(last), last, whole=brokers.in_sync))


def test_frozen(brokers: Brokers, database_url: str, tmp_path: Path) -> None:
    """In the campaign seen to fail without `socket.timeout.ms` and `_DESTROY_BROKER` (kafka/config.py, faults.py):
    after a freeze of 3 s nothing moved for a minute, after one of 13 s the worker ended over a message that was good.
    """
    with running(Spine, brokers, database_url, tmp_path, rate=RATE) as flow:
        through(brokers, flow, frozen(flow.roles["coordinator of transactions"](), seconds=LONG))
