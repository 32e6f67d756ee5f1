"""I4, I8: what a cycle published. In the outbox where nothing relays, else in the broker's committed transactions."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from eoframework.checkpoint import Checkpoint
from eoframework.db.outbox import decode_headers
from tests.campaign.forked_case import OUT, WRITTEN, Case, Place


class Left(Protocol):
    """What of the cycle is looked at here."""

    rows: dict[str, list[tuple[Any, ...]]]
    broker: list[list[dict[str, Any]]]
    effects: dict[Place, list[tuple[Any, ...]]]
    dead: dict[Place, tuple[Any, ...]]
    decided: dict[Place, str]


def check_published(case: Case, seen: Left) -> Iterable[str]:
    """Everything about the outbox that is not as it must be."""
    if case.flow.relays:
        yield from _relayed(case, seen)
    else:
        yield from check_outbox(case, seen)


def check_outbox(case: Case, seen: Left) -> Iterable[str]:
    """An outbox that nothing relays holds what was booked, at every moment."""
    booked = Counter((row[0], row[1]) for row in seen.rows["effects"])
    rows = Counter((int(p), int(o)) for p, o in seen.rows["outbox"])
    if rows != booked:
        yield f"I4: outbox rows too many {rows - booked}, missing {booked - rows}"
    letters = Counter(_letter(row[0]) for row in seen.rows["letters"])
    buried = Counter([*seen.dead, *seen.decided]) if case.flow.dead_letter_topic else Counter()
    if letters != buried:
        yield f"I6: published dead letters {letters}, dead are {buried}"


def _letter(headers: str) -> Place:
    found = dict(decode_headers(json.loads(headers)))
    return int(found["eo-dlt-partition"] or b""), int(found["eo-dlt-offset"] or b"")


def _relayed(case: Case, seen: Left) -> Iterable[str]:
    sent = [record for records in seen.broker for record in records if record["topic"] == OUT]
    places = Counter(_place(record) for record in sent)
    booked = {place for place, rows in seen.effects.items() if rows}
    refused = {place for place in booked if case.sent[place].fails == "refused"}
    booked |= {(WRITTEN, 2 * row[0] + half) for row in seen.rows["written"] for half in (0, 1)}
    if len(seen.rows["written"]) != case.flow.writes:
        yield f"I1: of {case.flow.writes} transactions of the application {seen.rows['written']} are there"
    kept = booked - set(places)
    if places - Counter(booked):
        yield f"I8: published too often {places - Counter(booked)}"
    if not kept <= refused:
        yield f"I8: not published: {kept - refused}"
    yield from _refused(case, seen, refused, kept)
    yield from _key_order(case, sent)
    yield from _checkpoints(seen)
    if seen.rows["outbox"]:
        yield f"I10: left in the outbox: {seen.rows['outbox']}"


def _refused(case: Case, seen: Left, refused: set[Place], kept: set[Place]) -> Iterable[str]:
    """What Kafka refuses dies once; an operator decides about it once, and it is sent, or gone for good."""
    dead = len(seen.rows["outbox_dead"])
    if not case.flow.operator:
        if dead != len(refused) or kept != refused:
            yield f"I11: {dead} dead letters of the outbox, refused were {refused}, not published {kept}"
        return
    if dead or seen.rows["held"]:
        yield f"I12: {dead} dead letters that were decided about, held {seen.rows['held']}"
    # With `hold` only the first of a key dies: what waits behind it is sent when it is mended.
    keys = Counter(case.sent[place].key for place in refused)
    dying = sum(keys.values()) if case.flow.relay_after_dead == "continue" else len(keys)
    audit = Counter(action for action, _ in seen.rows["outbox_audit"])
    if audit != +Counter({"outbox.retry": dying - len(kept), "outbox.discard": len(kept)}):
        yield f"I11: the audit says {audit}, {dying} were refused, {len(kept)} not published"
    odd = {place for place in refused if place[1] % 2}
    if not kept <= odd or (case.flow.relay_after_dead == "continue" and kept != odd):
        yield f"I11: not published {kept}, to be discarded were {odd}"


def _key_order(case: Case, sent: list[dict[str, Any]]) -> Iterable[str]:
    keys: dict[tuple[int, str], list[int]] = defaultdict(list)
    for record in sent:
        partition, offset = _place(record)
        # With `continue` the others of its key went on when it died.
        sent_as = case.sent[partition, offset].fails if partition != WRITTEN else "never"
        late = sent_as == "late" or (sent_as == "refused" and case.flow.relay_after_dead == "continue")
        if record["key"] is not None and not late:
            keys[partition, record["key"]].append(offset)
    for key, offsets in keys.items():
        if offsets != sorted(offsets):
            yield f"I3: published of {key} out of order: {offsets}"


def _checkpoints(seen: Left) -> Iterable[str]:
    """Each transaction names in its checkpoint how many messages it holds; the database has counted them all."""
    batch, owner = seen.rows["shard"][0]
    if batch != len(seen.broker):
        yield f"I8: {len(seen.broker)} transactions were committed, the database counts {batch}"
    if owner is not None:
        yield f"I12: the shard is still owned by {owner}"
    for number, records in enumerate(seen.broker, 1):
        last = records[-1]
        point = Checkpoint.decode(last["value"].encode()) if last["topic"].startswith("eo.relay.") else None
        if point is None or point.batch_no != number or len(point.seqs) != len(records) - 1:
            yield f"I8: transaction {number} of {len(records)} records ends with the checkpoint {point}"


def _place(record: Mapping[str, Any]) -> Place:
    value = json.loads(record["value"])
    return value["p"], value["o"]
