"""What a run must come to: two runs without a crash say what it is, and what is another thing each time anyway."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eoframework.crashtest.differences import projected
from eoframework.crashtest.state import LETTERS, TOPIC, State
from eoframework.db.contents import Row, Table

_SHOWN = 5
_NONE = Table("", ())


@dataclass(frozen=True, slots=True)
class Difference:
    """How one table, or topic, of a run differs from what it must be."""

    place: str
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    reordered: int = 0
    rows: tuple[str, ...] = ()
    """Some of the rows that differ, each as a sentence."""

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled or self.changed or self.reordered)


@dataclass(slots=True)
class Reference:
    """What tables and topics must be after the load, as far as that is the same in each run."""

    state: State
    left_out: dict[str, frozenset[str]] = field(default_factory=dict)
    """By table: columns that differ between two runs without a crash."""
    unsteady: dict[str, str] = field(default_factory=dict)
    """Tables of which nothing can be said, and why."""
    lanes: dict[str, str] = field(default_factory=dict)
    """By table: the column that says to which key a row belongs, where its order was the same both times."""

    @classmethod
    def of(cls, first: State, second: State, *, keys: Collection[str]) -> Reference:
        """The reference of two runs of one load; `keys`: of its messages."""
        reference = cls(first)
        for name in sorted({*first.tables, *second.tables}):
            one, other = first.tables.get(name, _NONE), second.tables.get(name, _NONE)
            if len(one.rows) != len(other.rows):
                why = f"{len(one.rows)} rows after one run without a crash, {len(other.rows)} after another"
                reference.unsteady[name] = why
                continue
            dropped = _varying(one.rows, other.rows)
            if dropped:
                reference.left_out[name] = frozenset(dropped)
            lane = _lane(one, dropped, keys)
            if lane is not None and _orders(one, lane, dropped) == _orders(other, lane, dropped):
                reference.lanes[name] = lane
        return reference

    def compare(self, state: State) -> list[Difference]:
        """Where the run has come to something else; empty when it is all the same."""
        found = []
        for name in sorted({*self.state.tables, *state.tables}):
            if name not in self.unsteady:
                found.append(self._table(self.state.tables.get(name, _NONE), state.tables.get(name, _NONE)))
        for topic, ids in sorted(state.twice.items()):
            new = sorted(set(ids) - set(self.state.twice.get(topic, ())))
            told = tuple(f"message {identity} stands in it twice" for identity in new[:_SHOWN])
            found.append(Difference(f"{TOPIC}{topic}", doubled=len(new), rows=told))
        return _merged(one for one in found if one)

    def _table(self, must: Table, is_: Table) -> Difference:
        name = must.name or is_.name
        dropped = self.left_out.get(name, frozenset())
        wanted = Counter(projected(row, dropped) for row in must.rows)
        there = Counter(projected(row, dropped) for row in is_.rows)
        if wanted != there:
            return _rows(name, wanted, there, key=[column for column in must.key if column not in dropped])
        lane = self.lanes.get(name)
        if lane is None:
            return Difference(name)
        before, after = _orders(must, lane, dropped), _orders(is_, lane, dropped)
        wrong = [key for key, rows in before.items() if after.get(key) != rows]
        told = tuple(f"{lane} {key}: {_first_difference(before[key], after.get(key, []))}" for key in wrong[:_SHOWN])
        return Difference(name, reordered=len(wrong), rows=told)


def _rows(name: str, wanted: Counter[str], there: Counter[str], *, key: Sequence[str]) -> Difference:
    missing, extra = list((wanted - there).elements()), list((there - wanted).elements())
    told: list[str] = []
    changed = 0
    if key:
        others = {_key(row, key): row for row in extra}
        for row in [row for row in missing if _key(row, key) in others]:
            other = others.pop(_key(row, key))
            told.append(f"{row} became {other}")
            missing.remove(row)
            extra.remove(other)
            changed += 1
    told += [_told(row, wanted[row], there[row]) for row in dict.fromkeys((*extra, *missing))]
    return Difference(name, lost=len(missing), doubled=len(extra), changed=changed, rows=tuple(told[:_SHOWN]))


def _told(row: str, wanted: int, there: int) -> str:
    if not there:
        return f"{row} is missing"
    if not wanted:
        return f"{row} should not be there"
    return f"{row} is there {_times(there)}, not {_times(wanted)}"


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def _key(row: str, columns: Sequence[str]) -> str:
    values = json.loads(row)
    return json.dumps([values.get(column) for column in columns])


def _varying(one: Sequence[Row], other: Sequence[Row]) -> set[str]:
    """Columns without which the rows are the same; as few as can be found by looking at each of them."""
    columns = sorted({name for row in (*one, *other) for name in row})
    dropped = {name for name in columns if _values(one, name) != _values(other, name)}
    while not _same(one, other, dropped):
        left = [name for name in columns if name not in dropped]
        # One that holds the same values, in other rows: numbers in the order of arrival.
        alone = next((name for name in left if _same(one, other, {*dropped, name})), None)
        dropped.add(alone or left[-1])
    return dropped


def _same(one: Sequence[Row], other: Sequence[Row], dropped: Collection[str]) -> bool:
    return Counter(projected(row, dropped) for row in one) == Counter(projected(row, dropped) for row in other)


def _values(rows: Sequence[Row], column: str) -> Counter[str]:
    return Counter(json.dumps(row.get(column), sort_keys=True) for row in rows)


def _lane(table: Table, dropped: Collection[str], keys: Collection[str]) -> str | None:
    """The column that tells to which key a row belongs, in a table whose rows tell their order."""
    if not table.rows or table.name == LETTERS:
        return None
    if table.name.startswith(TOPIC):
        return "key"
    if not table.numbered:
        return None
    columns = [name for name in table.rows[0] if name not in (*dropped, *table.numbered)]
    return next((name for name in columns if all(str(row.get(name)) in keys for row in table.rows)), None)


def _orders(table: Table, lane: str, dropped: Collection[str]) -> dict[str, list[str]]:
    rows: Sequence[Mapping[str, Any]] = table.rows
    if table.numbered:
        rows = sorted(rows, key=lambda row: row[table.numbered[0]])
    orders: dict[str, list[str]] = {}
    for row in rows:
        orders.setdefault(str(row.get(lane)), []).append(projected(row, dropped))
    # What has no key has no order.
    orders.pop("None", None)
    return orders


def _first_difference(must: Sequence[str], is_: Sequence[str]) -> str:
    for number, (one, other) in enumerate(zip(must, is_, strict=False), start=1):
        if one != other:
            return f"row {number} of {len(must)} should be {one} and is {other}"
    return f"{len(must)} rows, and {len(is_)} found"


def _merged(found: Any) -> list[Difference]:
    by_place: dict[str, Difference] = {}
    for one in found:
        other = by_place.get(one.place, Difference(one.place))
        by_place[one.place] = Difference(
            one.place,
            max(one.lost, other.lost),
            max(one.doubled, other.doubled),
            one.changed + other.changed,
            one.reordered + other.reordered,
            (*other.rows, *one.rows)[:_SHOWN],
        )
    return list(by_place.values())
