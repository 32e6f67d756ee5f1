"""What must be left of a cycle, whoever was killed in it: read with plain SQL, compared with what was sent.

The numbers are the campaign's invariants: I1 nothing lost, I2 nothing doubled, I3 order per key, I4 effect, processed
id and outbox row go together, I8 published is what was committed, I9 no write without ownership, I10 drained, I11 one
dead letter and no effect, I12 nothing left over.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Channel
from typing import Any

import psycopg
from sqlalchemy import make_url

from tests.campaign.forked_case import ATTEMPTS, OUT, TOPIC, Case, Place, Sent, decision
from tests.campaign.forked_outbox_check import check_outbox, check_published
from tests.campaign.forked_world import ITEM, NO_KEY

Rows = list[tuple[Any, ...]]
_TIDY_EVERY = 200
_OWN = "account, effect, written"
_OURS = """
SELECT string_agg(format('%I.%I', schemaname, tablename), ', ') FROM pg_tables
WHERE schemaname = 'eo' AND tablename NOT IN ('outbox', 'relay_shard') AND tablename NOT LIKE '%version%'
"""
_EMPTY_OUTBOX = """
DELETE FROM eo.outbox_message; DELETE FROM eo.delayed_message;
DELETE FROM eo.outbox_held; DELETE FROM eo.dead_letter WHERE origin = 'outbox';
DELETE FROM eo.relay_member; DELETE FROM eo.audit WHERE action LIKE 'outbox.%';
DELETE FROM eo.relay_shard WHERE shard > 0; UPDATE eo.outbox SET shards = 1;
UPDATE eo.relay_shard SET owner = NULL, lease_until = NULL, batch_no = 0, cluster_id = NULL, checkpoint_topic_id = NULL
"""
# What the next process need not wait for: its predecessor is dead, and its leases run out. Not those that it holds.
_LEASES_END = """
WITH calls AS (UPDATE eo.external_call SET lease_until = clock_timestamp() WHERE done_at IS NULL
    AND consumer_id = (SELECT id FROM eo.consumer WHERE name = %s || '.book'))
UPDATE eo.relay_shard SET lease_until = clock_timestamp() WHERE owner IS NOT NULL
"""
_LEFT_OPEN = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND state LIKE 'idle in transaction%' AND xact_start < clock_timestamp() - interval '10 seconds'
"""
_QUESTIONS = {
    "effects": 'SELECT partition, "offset", key, amount, attempt, called, rightful, seq FROM effect '
    "WHERE consumer = %(n)s ORDER BY seq",
    "accounts": "SELECT key, balance, items FROM account WHERE consumer = %(n)s",
    "processed": "SELECT message_id, processed_at < now() - interval '7 days' FROM eo.processed_message "
    "WHERE consumer_id = %(c)s",
    "positions": "SELECT partition, next_offset, owner FROM eo.position WHERE consumer_id = %(c)s",
    "parked": 'SELECT partition, "offset" FROM eo.parked_message WHERE consumer_id = %(c)s',
    "lanes": "SELECT partition, held FROM eo.parked_key WHERE consumer_id = %(c)s",
    "attempts": 'SELECT partition, "offset", attempts, crashes FROM eo.attempt WHERE consumer_id = %(c)s',
    "dead": 'SELECT partition, "offset", attempts, crashes, error_class FROM eo.dead_letter '
    "WHERE consumer_id = %(c)s AND origin = 'handler'",
    "decided": "SELECT action, detail->>'place' FROM eo.audit WHERE detail->>'consumer' = %(n)s",
    "calls": 'SELECT partition, "offset", done_at IS NOT NULL, settled_at IS NOT NULL, result::text '
    "FROM eo.external_call WHERE consumer_id = %(c)s",
    "coverage": "SELECT partition, covered_from FROM eo.coverage WHERE consumer_id = %(c)s",
    "outbox": "SELECT convert_from(payload, 'UTF8')::json->>'p', convert_from(payload, 'UTF8')::json->>'o' "
    "FROM eo.outbox_message WHERE topic = %(out)s AND source = %(a)s",
    "letters": "SELECT headers::text FROM eo.outbox_message WHERE topic = %(n)s || '.dlt'",
    "outbox_dead": "SELECT message_id FROM eo.dead_letter WHERE origin = 'outbox' AND topic = %(out)s",
    "held": "SELECT topic FROM eo.outbox_held WHERE topic = %(out)s",
    "outbox_audit": "SELECT action, detail->>'message_id' FROM eo.audit WHERE detail->>'topic' = %(out)s",
    "written": "SELECT number FROM written WHERE consumer = %(a)s",
    "shard": "SELECT batch_no, owner FROM eo.relay_shard WHERE shard = 0",
}


@dataclass
class Seen:
    """What is left of the cycle, in the database and outside."""

    rows: dict[str, Rows]
    facts: list[str]
    broker: list[list[dict[str, Any]]]
    effects: dict[Place, Rows] = field(default_factory=lambda: defaultdict(list))
    dead: dict[Place, tuple[Any, ...]] = field(default_factory=dict)
    decided: dict[Place, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows["effects"]:
            self.effects[row[0], row[1]].append(row)
        self.dead = {(row[0], row[1]): row for row in self.rows["dead"]}
        self.decided = {_place(place): action.split(".")[1] for action, place in self.rows["decided"] if place}

    @property
    def healed(self) -> bool:
        return "healed" in self.facts


def serve(channel: Channel, url: str) -> None:
    """Answer until the other side is gone."""
    conninfo = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        cycles = 0
        while True:
            try:
                what, *rest = channel.recv()
            except EOFError:
                return
            answer: list[str] = []
            if what == "leases end":
                connection.execute(_LEASES_END, rest)
            elif what == "prepare":
                answer = _prepare(connection, rest[0], tidy=cycles % _TIDY_EVERY == 0)
                cycles += 1
            else:
                answer = (check if what == "check" else check_meanwhile)(connection, *rest)
            channel.send(answer)


def _prepare(connection: psycopg.Connection[Any], case: Case, *, tidy: bool) -> list[str]:
    """The tables are emptied now and then, or every statement would grow slower with the campaign."""
    connection.execute("SET lock_timeout = '20s'")
    if tidy:
        ours = connection.execute(_OURS).fetchone()
        connection.execute(f"TRUNCATE {_OWN}, {ours[0] if ours else ''}")
    if case.flow.relays:
        connection.execute(_EMPTY_OUTBOX)
    return []


def look(connection: psycopg.Connection[Any], name: str, facts: list[str], broker: list[list[dict[str, Any]]]) -> Seen:
    group = f"{name}.book"
    found = connection.execute("SELECT id FROM eo.consumer WHERE name = %s", [group]).fetchone()
    here = {"n": group, "a": name, "out": OUT, "c": found[0] if found else -1}
    # One snapshot: a process that was killed a moment ago may still be committing.
    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    with connection.pipeline():
        cursors = {what: connection.execute(statement, here) for what, statement in _QUESTIONS.items()}
        rows = {what: cursor.fetchall() for what, cursor in cursors.items()}
    connection.execute("COMMIT")
    return Seen(rows, facts, broker)


def check(
    connection: psycopg.Connection[Any], case: Case, name: str, facts: list[str], broker: list[list[dict[str, Any]]]
) -> list[str]:
    """Everything that is not as it must be."""
    seen = look(connection, name, facts, broker)
    found = [
        *_each_message_once(case, seen),
        *_fates(case, seen),
        *_accounts(seen),
        *_order(case, seen),
        *_ids(case, seen),
        *_ownership(case, seen),
        *_nothing_left(case, seen),
        *_calls(case, seen),
        *check_published(case, seen),
    ]
    open_ones = connection.execute(_LEFT_OPEN).fetchone()
    if open_ones and open_ones[0]:
        found.append(f"I10: {open_ones[0]} transactions are still open")
    return found


def check_meanwhile(connection: psycopg.Connection[Any], case: Case, name: str, facts: list[str]) -> list[str]:
    """What is not as it must be at every moment, whatever is still to be done."""
    seen = look(connection, name, facts, [])
    found = [
        *_one_state(case, seen),
        *_accounts(seen),
        *_order(case, seen),
        *_owned(seen),
        *_ids(case, seen, final=False),
    ]
    return [*found, *(check_outbox(case, seen) if not case.flow.relays else ())]


def _one_state(case: Case, seen: Seen) -> Iterable[str]:
    """A message is done, dead or waits, and its offset is behind the position; or it is none of these."""
    positions = {row[0]: row[1] for row in seen.rows["positions"]}
    waiting = {(row[0], row[1]) for row in seen.rows["parked"]}
    for identity, deliveries in _groups(case).items():
        ends = []
        for place in (sent.place for sent in deliveries):
            ends += [f"effect {place}" for _ in seen.effects[place]]
            states = [name for name, places in (("dead", seen.dead), ("waits", waiting)) if place in places]
            ends += [f"dead {place}" for _ in states if "dead" in states]
            ends += [f"discarded {place}" for _ in [0] if seen.decided.get(place) == "discard"]
            if len(states) + bool(seen.effects[place]) > 1:
                yield f"I11: {place} is {states}, and has {len(seen.effects[place])} effects"
            repeated = case.flow.reprocesses and place[1] < case.half(place[0])
            if (states or seen.effects[place]) and place[1] >= positions.get(place[0], 0) and not repeated:
                yield f"I4: {place} is done or set aside ({states}), and is to be read again from {positions}"
        if len(ends) > 1:
            yield f"I2: {identity} counts {len(ends)} times: {ends}"
    read = {place for place in case.sent if place[1] < positions.get(place[0], 0)}
    for identity, deliveries in _groups(case).items():
        places = {sent.place for sent in deliveries}
        done = any(seen.effects[place] or place in seen.dead or place in seen.decided for place in places)
        if places <= read and not done and not places & waiting and not case.flow.reprocesses:
            yield f"I1: {identity} of {places} is lost: read, and neither done, dead nor waiting"


# --- I1, I2, I11: what became of each message ---


def _groups(case: Case) -> dict[object, list[Sent]]:
    groups: dict[object, list[Sent]] = defaultdict(list)
    for sent in case.sent.values():
        groups[sent.identity].append(sent)
    return groups


def _each_message_once(case: Case, seen: Seen) -> Iterable[str]:
    for identity, deliveries in _groups(case).items():
        ends = [f"effect {row[0]}@{row[1]}" for sent in deliveries for row in seen.effects[sent.place]]
        ends += [f"dead {sent.place}" for sent in deliveries if sent.place in seen.dead]
        ends += [f"discarded {sent.place}" for sent in deliveries if seen.decided.get(sent.place) == "discard"]
        if not ends:
            yield f"I1: {identity} of {[sent.place for sent in deliveries]} is lost"
        elif len(ends) > 1:
            number = "I11" if len({end.split()[0] for end in ends}) > 1 else "I2"
            yield f"{number}: {identity} counts {len(ends)} times: {ends}"


def _fates(case: Case, seen: Seen) -> Iterable[str]:
    killed = {tuple(map(int, fact.split()[1:])) for fact in seen.facts if fact.startswith("deadly ")}
    for place, sent in case.sent.items():
        for row in seen.effects[place]:
            if not case.flow.operator and row[4] != (right := _succeeds_at(sent)) and place not in killed:
                yield f"I2: {place} ({sent.fails}) succeeded at attempt {row[4]}, not {right}"
        if place in seen.dead:
            yield from _died_rightly(case, sent, seen.dead[place])
        if place in seen.decided and seen.decided[place] != decision(case, sent):
            yield f"I11: {place} was to be decided by {decision(case, sent)}, and was by {seen.decided[place]}"
    for place, row in seen.dead.items():
        if case.flow.operator and not case.flow.relays:
            yield f"I11: {place} is a dead letter after all of them were decided about: {row}"


def _succeeds_at(sent: Sent) -> int:
    if sent.fails in ("raises", "sql", "later", "undone"):
        return sent.times + 1 if sent.times < ATTEMPTS else -1
    return -1 if sent.fails in ("rejects", "undecodable") else 1


def _died_rightly(case: Case, sent: Sent, row: tuple[Any, ...]) -> Iterable[str]:
    attempts, crashes, error = row[2:5]
    if sent.fails == "kills" and error == "eoframework.errors.ProcessDied" and crashes >= case.crashes:
        return
    if error == "eoframework.external.CallUnresolved" and case.flow.external in ("ask", "give_up"):
        return
    may_die = sent.fails in ("rejects", "undecodable") or (sent.fails != "never" and sent.times >= ATTEMPTS)
    right = 1 if sent.fails in ("rejects", "undecodable") else ATTEMPTS
    if not may_die or attempts != right:
        yield f"I11: {sent.place} ({sent.fails} {sent.times}) died of {error} at attempt {attempts}, crashes {crashes}"


# --- I2, I3: sums and order ---


def _accounts(seen: Seen) -> Iterable[str]:
    """What a handler reads and writes again shows what was done twice, or undone by halves."""
    sums: Counter[bytes] = Counter()
    items: dict[bytes, list[int]] = defaultdict(list)
    for partition, offset, key, amount, *_ in seen.rows["effects"]:
        sums[bytes(key)] += amount
        items[bytes(key)].append(partition * ITEM + offset)
    accounts = {bytes(key): (balance, list(entries)) for key, balance, entries in seen.rows["accounts"]}
    for key in sums.keys() | accounts.keys():
        if accounts.get(key) != (sums[key], items[key]):
            yield f"I2: account {key!r} is {accounts.get(key)}, its effects are {sums[key]}, {items[key]}"


def _order(case: Case, seen: Seen) -> Iterable[str]:
    flow = case.flow
    lanes: dict[object, list[int]] = defaultdict(list)
    for partition, offset, key, *_ in seen.rows["effects"]:
        if flow.after_dead == "continue" and seen.decided.get((partition, offset)) == "replay":
            continue  # what waited behind a dead letter went on; it comes when a person says so
        if flow.reprocesses and offset < case.half(partition):
            continue
        if flow.ordering == "partition":
            lanes[partition].append(offset)
        elif bytes(key) != NO_KEY:
            lanes[partition, bytes(key)].append(offset)
    for lane, offsets in lanes.items():
        if offsets != sorted(offsets):
            yield f"I3: {lane} out of order: {offsets}"


# --- I4: ids ---


def _ids(case: Case, seen: Seen, *, final: bool = True) -> Iterable[str]:
    done = {place for place, rows in seen.effects.items() if rows} | seen.dead.keys()
    done |= {place for place, action in seen.decided.items() if action == "discard"}
    right = {case.sent[place].identity for place in done if case.sent[place].name}
    found = {row[0] for row in seen.rows["processed"]}
    if case.flow.prunes:
        yield from _forgotten(case, seen, right, found, final=final)
    elif found != right:
        yield f"I4: processed ids {found - right} of nothing that is done, {right - found} are missing"


def _forgotten(case: Case, seen: Seen, right: set[object], found: set[Any], *, final: bool) -> Iterable[str]:
    covered: dict[int, int] = {row[0]: row[1] for row in seen.rows["coverage"]}
    for sent in case.sent.values():
        young = sent.offset >= case.half(sent.partition)
        if not sent.name or not seen.effects[sent.place]:
            continue
        if sent.identity not in found and sent.offset >= covered.get(sent.partition, 0):
            yield f"I2: the id of {sent.place} is forgotten, and counts as covered from {covered}"
        if young and sent.identity not in found:
            yield f"I4: the id of {sent.place} is forgotten before its time"
        if final and not young and sent.identity in found:
            yield f"I12: the id of {sent.place} is old enough, and still there"
    if found - right:
        yield f"I4: processed ids {found - right} of nothing that is done"


# --- I9, I10, I12: who wrote, and what is left ---


def _owned(seen: Seen) -> Iterable[str]:
    for row in seen.rows["effects"]:
        if not row[6]:
            yield f"I9: the effect {row[:2]} of a process that no longer owned it"


def _ownership(case: Case, seen: Seen) -> Iterable[str]:
    yield from _owned(seen)
    ends = {partition: len(log) for partition, log in case.logs.items()}
    found = {row[0]: row[1] for row in seen.rows["positions"]}
    if found != ends:
        yield f"I7: positions {found}, the logs end at {ends}"
    if any(row[2] is not None for row in seen.rows["positions"]):
        yield f"I12: left in order, and not released: {seen.rows['positions']}"


def _nothing_left(case: Case, seen: Seen) -> Iterable[str]:
    for what in ("parked", "lanes", "attempts"):
        if seen.rows[what]:
            yield f"I12: {what}: {seen.rows[what]}"


def _calls(case: Case, seen: Seen) -> Iterable[str]:
    """A call whose outcome nobody knows is made again only where the handler says that it may be.

    Whichever delivery of a message it was made for: its row is the message's, not the delivery's.
    """
    if case.flow.external is None:
        return
    made = Counter(fact.rsplit(" ", 2)[0] for fact in seen.facts if fact.startswith("call "))
    keys = {fact.rsplit(" ", 1)[0] for fact in seen.facts if fact.startswith("call ")}
    rows = {(row[0], row[1]): row[2:] for row in seen.rows["calls"]}
    for deliveries in _groups(case).values():
        places = [sent.place for sent in deliveries]
        calls = [f"call {partition} {offset}" for partition, offset in places]
        times = sum(made[call] for call in calls)
        effects = [row for place in places for row in seen.effects[place]]
        row = next((rows[place] for place in places if place in rows), None)
        if effects and not times:
            yield f"I2: {places} have their effect, and were never called for"
        if times > 1 and case.flow.external != "retry":
            yield f"I2: {places} were called for {times} times, with unresolved={case.flow.external!r}"
        if len({key.split()[3] for key in keys for call in calls if key.startswith(f"{call} ")}) > 1:
            yield f"I2: {places} were called for with several idempotency keys"
        if effects and not (row and row[0] and row[1]):
            yield f"I4: {places} have their effect, their call is {row}"
        elif effects and row and str(effects[0][5]) != row[2]:
            yield f"I4: {places} used the result {effects[0][5]}, stored is {row[2]}"


def _place(text: str) -> Place:
    partition, offset = text.removeprefix(f"{TOPIC}[").split("]@")
    return int(partition), int(offset)
