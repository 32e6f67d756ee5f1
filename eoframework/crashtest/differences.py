"""What differs between two states of the application's tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from eoframework.db.contents import Row, Table

_NO_TABLE = Table("", ())


@dataclass(frozen=True, slots=True)
class Changed:
    """Rows of one table that are in one state and not in the other, as often as they are."""

    gone: tuple[Row, ...]
    new: tuple[Row, ...]

    @property
    def size(self) -> tuple[int, int]:
        return len(self.gone), len(self.new)


def changes(before: Mapping[str, Table], after: Mapping[str, Table]) -> dict[str, Changed]:
    """The tables that differ, and how."""
    found = {}
    for name in sorted({*before, *after}):
        old, new = _counted(before.get(name, _NO_TABLE)), _counted(after.get(name, _NO_TABLE))
        if old != new:
            found[name] = Changed(_rows(old - new), _rows(new - old))
    return found


def projected(row: Row, without: Collection[str]) -> str:
    """The row without these columns, as text that is the same for equal rows."""
    kept = {name: value for name, value in row.items() if name not in without}
    return json.dumps(kept, sort_keys=True, ensure_ascii=False)


def _counted(table: Table) -> Counter[str]:
    return Counter(projected(row, ()) for row in table.rows)


def _rows(counted: Counter[str]) -> tuple[Row, ...]:
    return tuple(json.loads(text) for text in counted.elements())
