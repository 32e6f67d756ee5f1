"""The campaign's application: two handlers with a ledger each, joined by the outbox, and a transform behind them.

What fails, and how often, follows from a message's number (tests/campaign/ledger_rules.py). CAMPAIGN_RAISE_AT="NAME:n"
raises at the n-th such event, in whatever callback that is; CAMPAIGN_CLOCK shifts the wall clock by so many seconds;
CAMPAIGN_WITHOUT removes a protection, for the test that the checker sees it.
"""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta
from typing import Any

from pydantic import BaseModel
from sqlalchemy import text

from eoframework import App, Message, Reject, Retry, Topic, Tx, clock, events, fixed
from tests.campaign import ledger_rules as rules
from tests.campaign.nemeses_without import remove

# Triggers on the framework's own tables, in the same transactions: what was committed, by whom, told by the server.
TABLES = """
CREATE TABLE public.effect (seq bigint GENERATED ALWAYS AS IDENTITY, consumer text, partition int, "offset" bigint,
    id uuid, key text, item bigint, amount bigint, attempt int, xid xid8 DEFAULT pg_current_xact_id());
CREATE TABLE public.account (consumer text, key text, balance bigint, items bigint[], PRIMARY KEY (consumer, key));
CREATE TABLE public.outbox_seen (seq bigint GENERATED ALWAYS AS IDENTITY, id uuid, topic text,
    xid xid8 DEFAULT pg_current_xact_id());
CREATE TABLE public.position_seen (seq bigint GENERATED ALWAYS AS IDENTITY, consumer text, partition int, epoch bigint,
    next_offset bigint, xid xid8 DEFAULT pg_current_xact_id());
CREATE FUNCTION public.see_outbox() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO public.outbox_seen (id, topic) VALUES (new.id, new.topic); RETURN NULL; END $$;
CREATE FUNCTION public.see_position() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO public.position_seen (consumer, partition, epoch, next_offset)
        SELECT name, new.partition, new.epoch, new.next_offset FROM eo.consumer WHERE id = new.consumer_id;
        RETURN NULL;
    END $$;
CREATE TRIGGER seen AFTER INSERT ON eo.outbox_message FOR EACH ROW EXECUTE FUNCTION public.see_outbox();
CREATE TRIGGER seen AFTER UPDATE ON eo.position FOR EACH ROW EXECUTE FUNCTION public.see_position();
"""
_POST = text("""
WITH posted AS (INSERT INTO effect (consumer, partition, "offset", id, key, item, amount, attempt)
    VALUES (:consumer, :partition, :offset, :id, :key, :item, :amount, :attempt))
INSERT INTO account AS old VALUES (:consumer, :key, :amount, ARRAY[cast(:item AS bigint)])
ON CONFLICT (consumer, key) DO UPDATE SET balance = old.balance + excluded.balance, items = old.items || excluded.items
""")
WORLD = os.environ.get("CAMPAIGN_WORLD", "campaign")
PARTITIONS = int(os.environ.get("CAMPAIGN_PARTITIONS", "2"))


class Entry(BaseModel):
    key: str
    n: int


class Step(BaseModel):
    key: str
    item: int


class Settled(BaseModel):
    key: str
    item: int


class Crumb(BaseModel):
    item: int
    crumb: int


class Failing(Exception):
    """On purpose: it is tried again."""


entries = Topic(f"{WORLD}.entries", Entry, key="key", partitions=PARTITIONS)
steps = Topic(f"{WORLD}.steps", Step, key="key", partitions=PARTITIONS)
settled = Topic(f"{WORLD}.settled", Settled, key="key", partitions=PARTITIONS)
crumbs = Topic(f"{WORLD}.crumbs", Crumb, partitions=PARTITIONS)
app = App(WORLD)

# A process is killed far more often here than anywhere: an innocent message would be given up.
_AGAIN = Retry(attempts=5, backoff=fixed(0.02), crashes=1_000_000)


@app.handler(entries, name="book", retry=_AGAIN, breaker=None)
def book(message: Message[Entry], tx: Tx) -> None:
    entry = message.payload
    _post(message, tx, "book", entry.key, entry.n)
    for item in rules.steps_of(entry.n):
        tx.publish(steps, Step(key=entry.key, item=item))
    # Last: what is taken back is all there was.
    _fail(message, "book", entry.n)


@app.handler(steps, name="settle", retry=_AGAIN, breaker=None)
def settle(message: Message[Step], tx: Tx) -> None:
    step = message.payload
    _post(message, tx, "settle", step.key, step.item)
    tx.publish(settled, Settled(key=step.key, item=step.item))
    _fail(message, "settle", step.item)


@app.transform(settled, to=crumbs, name="crumble", retry=_AGAIN, breaker=None)
def crumble(message: Message[Settled]) -> list[Crumb]:
    item = message.payload.item
    _fail(message, "crumble", item)
    return [Crumb(item=item, crumb=crumb) for crumb in range(rules.crumbs(item))]


def _post(message: Message[Any], tx: Tx, consumer: str, key: str, item: int) -> None:
    values = {"partition": message.partition, "offset": message.offset, "id": message.id, "attempt": message.attempt}
    amount = rules.amount(consumer, item)
    tx.session.execute(_POST, {**values, "consumer": consumer, "key": key, "item": item, "amount": amount})


def _fail(message: Message[Any], consumer: str, item: int) -> None:
    if rules.poison(consumer, item):
        raise Reject(f"{consumer} does not take item {item}")
    if message.attempt <= rules.failures(consumer, item):
        raise Failing(f"attempt {message.attempt} at item {item}")


def _raise_at(where: str) -> None:
    """An exception nobody foresaw, in the callback that this event is told in."""
    point, nth = where.rsplit(":", 1)
    seen: Counter[str] = Counter()

    def on_event(name: str, _: dict[str, object]) -> None:
        seen[name] += 1
        if name == point and seen[name] == int(nth):
            raise RuntimeError(f"raised on purpose at {where}")

    events.subscribe(on_event)


def _shift_the_clock(seconds: float) -> None:
    true_now = clock.now
    clock.now = lambda: true_now() + timedelta(seconds=seconds)


if "CAMPAIGN_RAISE_AT" in os.environ:
    _raise_at(os.environ["CAMPAIGN_RAISE_AT"])
if "CAMPAIGN_CLOCK" in os.environ:
    _shift_the_clock(float(os.environ["CAMPAIGN_CLOCK"]))
if "CAMPAIGN_WITHOUT" in os.environ:
    remove(os.environ["CAMPAIGN_WITHOUT"])
