"""The table of events in DESIGN.md, section 5, as crashtest/points.py has it: python -m tests.campaign.design_table."""

from __future__ import annotations

import re

from eoframework.crashtest.points import BOUNDARIES
from tests.conftest import REPOSITORY

DESIGN = REPOSITORY / "DESIGN.md"
_HEAD = """| event | flow | durable before | durable after | a crash here leads to |
|---|---|---|---|---|
"""
_TABLE = re.compile(r"^\| event \|.*\n(?:\|.*\n)*", re.MULTILINE)


def rendered() -> str:
    """The table, a row for each boundary."""
    rows = (f"| `{b.name}` | {b.flow} | {b.before} | {b.after} | {b.leads_to} |" for b in BOUNDARIES)
    return _HEAD + "\n".join(rows) + "\n"


def written() -> str:
    """The table as it stands in DESIGN.md."""
    found = _TABLE.findall(section())
    assert len(found) == 1, "section 5 has one table"
    return str(found[0])


def section() -> str:
    """Section 5."""
    text = DESIGN.read_text()
    return text[text.index("\n## 5. ") : text.index("\n## 6. ")]


def main() -> None:
    old = section()
    DESIGN.write_text(DESIGN.read_text().replace(old, _TABLE.sub(lambda _: rendered(), old)))


if __name__ == "__main__":
    main()
