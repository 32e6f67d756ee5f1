"""What must be true of a group's messages at every moment, said without lanes, rows and transactions."""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator

from eoframework.keys import lane_of_key
from eoframework.message import position_id
from tests.failure.parking_world import ATTEMPTS, CRASHES, TOPIC_ID, Place, Script, Seen, World

_FAILING = "tests.failure.parking_world.Failing"
_ERRORS = {
    "raises": _FAILING,
    "sql": "sqlalchemy.exc.DataError",
    "later": "eoframework.errors.RetryLater",
    "rejects": "eoframework.errors.Reject",
    "kills": "eoframework.errors.ProcessDied",
    "undecodable": "eoframework.errors.DecodeError",
    "unreadable": "eoframework.errors.DecodeError",
}


class Model:
    """Remembers what a person decided, and compares what the database shows with what was promised."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._variant = world.variant
        self._known: set[int] = set()
        """Effects that were checked when they appeared."""
        self._known_dead: set[int] = set()
        self.replayed: dict[Place, int] = {}
        """Messages put back by hand, and the last effect before that."""
        self.discarded: set[Place] = set()
        self._decided: Counter[Place] = Counter()
        self.healed: set[Place] = set()

    def decided(self, place: Place, *, last_effect: int | None = None) -> None:
        """A dead letter was discarded, or put back when `last_effect` was the last."""
        self._decided[place] += 1
        if last_effect is None:
            self.discarded.add(place)
        else:
            self.replayed[place] = last_effect

    def check(self, seen: Seen) -> None:
        """Everything that holds at all times; `seen` is later than what was checked before."""
        self._each_place_is_in_one_state(seen)
        self._each_message_counts_once(seen)
        self._lanes_are_shut_by_what_waits(seen)
        self._counts(seen)
        self._in_order(seen)
        self._known |= {row[2] for row in seen.effects}
        self._known_dead |= {row[2] for row in seen.dead}

    # --- no loss, nothing twice ---

    def _each_place_is_in_one_state(self, seen: Seen) -> None:
        states: dict[Place, list[str]] = defaultdict(list)
        for name, rows in (("effect", seen.effects), ("parked", seen.parked), ("dead", seen.dead)):
            for row in rows:
                states[row[0], row[1]].append(name)
        for place in self.discarded:
            states[place].append("discarded")
        for place, found in states.items():
            assert len(found) == 1, f"{place}: {found}"
            assert place[1] < seen.positions[place[0]][0], f"{place} is {found[0]}, and to be read again"
        for partition, log in self._world.logs.items():
            assert seen.positions[partition][0] <= len(log)

    def _each_message_counts_once(self, seen: Seen) -> None:
        done = {(row[0], row[1]) for row in (*seen.effects, *seen.dead)} | self.discarded
        waiting = {(row[0], row[1]) for row in seen.parked}
        processed = set()
        for identity, places in self._messages():
            resolved = [place for place in places if place in done]
            assert len(resolved) <= 1, f"{resolved} are deliveries of one message"
            read = all(offset < seen.positions[partition][0] for partition, offset in places)
            assert resolved or not read or waiting & set(places), f"lost: {places}"
            if resolved and identity is not None:
                processed.add(identity)
        assert seen.processed == processed, "ids of what is done, and of nothing else"

    def _messages(self) -> Iterator[tuple[uuid.UUID | None, list[Place]]]:
        """Each message with its deliveries; one without an id has one."""
        groups: dict[uuid.UUID, list[Place]] = defaultdict(list)
        for place in self._world.scripts:
            identity = self._world.id_of(place)
            if identity is None:
                yield None, [place]
            else:
                groups[identity].append(place)
        yield from groups.items()

    # --- what is written beside ---

    def _lanes_are_shut_by_what_waits(self, seen: Seen) -> None:
        waiting = {(row[0], row[2]) for row in seen.parked}
        for partition, offset, lane, *_ in seen.parked:
            assert lane == self._lane((partition, offset))
        held = {(row[0], self._lane((row[0], row[1]))) for row in seen.dead if row[5]}
        assert {(partition, lane) for partition, lane, _ in seen.keys} == waiting | held
        assert {(partition, lane) for partition, lane, holds in seen.keys if holds} == held

    def _lane(self, place: Place) -> uuid.UUID:
        key = self._world.logs[place[0]][place[1]].key
        if key is None or self._variant.ordering == "none":
            return position_id(TOPIC_ID, *place)
        return lane_of_key(key)

    def _counts(self, seen: Seen) -> None:
        published = Counter(("effect", row[0], row[1]) for row in seen.effects)
        if self._variant.dead_letter_topic:
            published.update(("dead", row[0], row[1]) for row in seen.dead)
            for (partition, offset), times in self._decided.items():
                published["dead", partition, offset] += times
        assert seen.outbox == published
        for row in (*seen.parked, *seen.attempts):
            assert row[-2] < ATTEMPTS, f"more attempts than the policy allows: {row}"
        for partition, offset, _, attempt, rightful, _ in (row for row in seen.effects if row[2] not in self._known):
            assert rightful, f"{partition}@{offset}: the effect of a worker that no longer owns the partition"
            if (partition, offset) not in self.healed:
                script = self._world.scripts[partition, offset]
                assert attempt == _succeeds_at(script), f"{partition}@{offset}: {script} succeeded at attempt {attempt}"
        for row in seen.dead:
            if row[2] not in self._known_dead:
                self._died_rightly((row[0], row[1]), attempts=row[3], error=row[4], crashes=row[7])

    def _died_rightly(self, place: Place, *, attempts: int, error: str, crashes: int) -> None:
        script = self._world.scripts[place]
        if error == _ERRORS["kills"]:
            # Whoever was in flight so often may be given up, guilty or not.
            assert crashes >= CRASHES
            assert self._world.crashes >= CRASHES
            return
        assert error == _ERRORS.get(script.fails), f"{place}: {script} died of {error}"
        counted = ATTEMPTS if script.fails in {"raises", "sql", "later"} else 1
        assert attempts == counted, f"{place}: {script} died at attempt {attempts}"
        assert script.times >= counted or script.fails in {"undecodable", "unreadable"}

    # --- order ---

    def _in_order(self, seen: Seen) -> None:
        """Within a key, and where the policy says so within the partition."""
        effects: dict[tuple[int, uuid.UUID], list[tuple[int, int, int]]] = defaultdict(list)
        whole: dict[tuple[int, uuid.UUID], list[tuple[int, int, int]]] = defaultdict(list)
        by_hand = {(place[0], self._lane(place)) for place in self.replayed}
        for partition, offset, seq, _, _, xid in seen.effects:
            lane = partition, self._lane((partition, offset))
            effects[lane].append((offset, seq, xid))
            if self._variant.ordering == "partition" and lane not in by_hand:
                whole[partition, TOPIC_ID].append((offset, seq, xid))
        for lane, rows in effects.items():
            self._lane_in_order(seen, lane[0], rows, lane[1])
        for (partition, _), rows in whole.items():
            offsets = [offset for offset, _, _ in rows]
            assert offsets == sorted(offsets), f"partition {partition} out of order: {offsets}"

    def _lane_in_order(self, seen: Seen, partition: int, rows: list[tuple[int, int, int]], lane: uuid.UUID) -> None:
        """A new effect came before nothing that stood in front of it, unless that was put back after it."""
        sequence = {offset: seq for offset, seq, _ in rows}
        waiting = {row[1] for row in seen.parked if row[0] == partition and row[2] == lane}
        dead = {row[1]: row for row in seen.dead if row[0] == partition and self._lane((row[0], row[1])) == lane}
        for offset, seq, xid in rows:
            if seq in self._known:
                continue
            for earlier in range(offset):
                if self.replayed.get((partition, earlier), -1) >= seq:
                    continue
                assert earlier not in waiting, f"{partition}@{offset} overtook {earlier}, which waits"
                assert sequence.get(earlier, 0) < seq, f"{partition}@{offset} overtook {earlier}"
                if earlier in dead:
                    assert dead[earlier][6] <= xid, f"{partition}@{offset} overtook {earlier}, which died later"
                    assert not dead[earlier][5], f"{partition}@{offset} ran while {earlier} holds the key"


def _succeeds_at(script: Script) -> int:
    if script.fails in {"never", "kills"}:
        return 1
    return script.times + 1 if script.fails in {"raises", "sql", "later"} and script.times < ATTEMPTS else -1
