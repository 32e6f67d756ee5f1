"""An app of transforms A -> B -> C, each with several outputs for an input; crash points armed by the environment.

`fan` takes lists and makes of one item three parts, each with a key, and so a partition, of its own; of some items it
makes none. `pair` takes messages and makes of each part two crumbs, which keep the part's key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaException
from pydantic import BaseModel

from eoframework import App, Message, Topic, clock, events
from eoframework.errors import Retryable
from eoframework.kafka import transaction
from tests.crash import arm_from_environment

PARTS = 3
CRUMBS = 2


class Item(BaseModel):
    key: str
    n: int


class Part(BaseModel):
    key: str
    n: int
    part: int


class Crumb(BaseModel):
    n: int
    part: int
    crumb: int


items = Topic(os.environ.get("CHAIN_A", "chain.a"), Item, key="key")
parts = Topic(os.environ.get("CHAIN_B", "chain.b"), Part, key="key")
crumbs = Topic(os.environ.get("CHAIN_C", "chain.c"), Crumb)
# Groups are the broker's, which tests share: members of another test would make this one's wait for them.
app = App(f"chain-{items.name}")


def parts_of(item: Item) -> list[Part]:
    """Every tenth item has none: its offset moves on without any output."""
    if item.n % 10 == 9:
        return []
    return [Part(key=f"{item.key}.{part}", n=item.n, part=part) for part in range(PARTS)]


def crumbs_of(part: Part) -> list[Crumb]:
    return [Crumb(n=part.n, part=part.part, crumb=crumb) for crumb in range(CRUMBS)]


@app.transform(items, to=parts, name="fan")
def fan(batch: list[Item]) -> list[list[Part]]:
    return [parts_of(item) for item in batch]


@app.transform(parts, to=crumbs, name="pair")
def pair(message: Message[Part]) -> Iterator[Crumb]:
    yield from crumbs_of(message.payload)


def abort_and_keep(producer: transaction.TransactionalProducer) -> None:
    """Without the protection against a late abort: the same producer goes on."""
    # Nothing may be in flight: librdkafka would otherwise raise the epoch by itself, which is a protection too.
    client = producer._ready().client
    client.flush(5)
    with suppress(KafkaException):  # asked twice, the second time nothing is open
        client.abort_transaction(10)


def fail_once(when: Path) -> None:
    """A transaction fails once all its records are in the log, if there is such a file."""
    send_offsets = transaction.TransactionalProducer.send_offsets

    def send_or_fail(producer: transaction.TransactionalProducer, *args: Any, **kwargs: Any) -> None:
        if when.exists():
            when.unlink()
            producer._ready().flush()
            raise Retryable("the test wants this transaction to fail.")
        send_offsets(producer, *args, **kwargs)

    transaction.TransactionalProducer.send_offsets = send_or_fail  # type: ignore[method-assign]


def linger(longest: float) -> None:
    """Transactions stay open for a while, with all their records in the log: whoever strikes will strike one."""

    def on_event(name: str, _: dict[str, object]) -> None:
        if name in ("kafka.transaction.flushed", "kafka.transaction.offsets_sent"):
            clock.sleep(clock.jitter(0, longest))

    events.subscribe(on_event)


if "CHAIN_LINGER" in os.environ:
    linger(float(os.environ["CHAIN_LINGER"]))
if "CHAIN_FAIL_ONCE" in os.environ:
    fail_once(Path(os.environ["CHAIN_FAIL_ONCE"]))
if "CHAIN_KEEP_AFTER_ABORT" in os.environ:
    transaction.TransactionalProducer.abort = abort_and_keep  # type: ignore[method-assign]
if "CHAIN_PATIENCE" in os.environ:
    # The share of retry.backoff.ms from which on a call is taken for one that was sent twice: inf, and none is.
    transaction._QUARANTINE_SHARE = float(os.environ["CHAIN_PATIENCE"])
arm_from_environment()
