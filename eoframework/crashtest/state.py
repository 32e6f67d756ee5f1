"""What the application has made of its load: its tables, its topics, its dead letters, and what it did besides."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eoframework.cloudevents import MESSAGE_ID
from eoframework.crashtest.user_stage import OURS, PREFIX, Scene
from eoframework.db import contents
from eoframework.db.contents import Table
from eoframework.kafka.scratch import read_all
from eoframework.message import Record
from eoframework.schema import Schema

LETTERS = "dead letters"
TOPIC = "topic "

_LINE = re.compile(r"eo\|(?P<app>[^|]*)\|(?P<database>[^|]*)\|(?P<session>[^|]*)\|(?P<transaction>[^|]*)\|\w+:  ")
_STATEMENT = re.compile(r"(?:statement|execute [^:]*): (.*)", re.S)


@dataclass(slots=True)
class State:
    """One run's."""

    tables: dict[str, Table] = field(default_factory=dict)
    """By name; the dead letters are one of them, and each topic is one, in its order."""
    twice: dict[str, list[str]] = field(default_factory=dict)
    """Topic -> ids of messages that stand in it more than once."""
    outside: dict[str, int] = field(default_factory=dict)
    """Statements that changed data in another transaction than a message's, and how often."""


def read_state(scene: Scene, server_log: Path, *, since: int) -> State:
    """What there is now. since: where the server's log ended when the run began."""
    schema = scene.database.schema
    with scene.database.begin("reading what the run has made") as connection:
        tables = contents.read(connection, schema)
        tables[LETTERS] = Table(LETTERS, tuple(contents.letters(connection, schema)))
    state = State(tables)
    for name, partitions in sorted(scene.topics.items()):
        records = read_all(scene.settings, name, partitions)
        tables[f"{TOPIC}{name}"] = Table(f"{TOPIC}{name}", tuple(_row(record) for record in records))
        ids = Counter(_identity(record) for record in records)
        state.twice[name] = [identity for identity, times in ids.items() if identity and times > 1]
    state.outside = outside(server_log, since=since, database=scene.name, schema=schema.name)
    return state


def _row(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {"key": None if record.key is None else record.key.decode(errors="backslashreplace")}
    try:
        value = json.loads(record.value) if record.value is not None else None
    except ValueError:
        value = (record.value or b"").decode(errors="backslashreplace")
    # Field by field, as the columns of a table: what is another in each run is left out by itself.
    fields = value if isinstance(value, dict) else {"value": value}
    return row | {f"payload.{name}": one for name, one in fields.items()}


def _identity(record: Record) -> str:
    found = dict(record.headers).get(MESSAGE_ID)
    return "" if found is None else found.decode(errors="replace")


def outside(server_log: Path, *, since: int, database: str, schema: str) -> dict[str, int]:
    """The statements of the application that changed data in a transaction of which no message is a part.

    A message's transaction is told by its fence: the UPDATE of its position row.
    """
    transactions: dict[tuple[str, str], list[str]] = {}
    for where, statement in _statements(server_log, since, database):
        transactions.setdefault(where, []).append(statement)
    ours = re.compile(rf'"?{schema}"?\."?({"|".join(sorted(_names(schema)))})\b')
    fence = re.compile(rf'UPDATE\s+"?{schema}"?\.position\b', re.I)
    found: Counter[str] = Counter()
    for statements in transactions.values():
        if not any(fence.search(statement) for statement in statements):
            found.update(" ".join(s.split())[:300] for s in statements if not ours.search(s))
    return dict(found)


def _names(schema: str) -> set[str]:
    return {name.partition(".")[2] for name in contents.ours(Schema(schema))}


def _statements(server_log: Path, since: int, database: str) -> Iterator[tuple[tuple[str, str], str]]:
    with server_log.open("rb") as file:
        file.seek(since)
        text = file.read().decode(errors="replace")
    # A statement of several lines goes on in lines that begin with a tab.
    for entry in re.split(r"\n(?=eo\|)", text.replace("\n\t", " ")):
        head = _LINE.match(entry)
        if head is None or head["database"] != database or head["app"] == OURS:
            continue
        told = _STATEMENT.match(entry[head.end() :])
        if told is not None:
            yield (head["session"], head["transaction"]), told[1].split("\n", 1)[0]


assert PREFIX.startswith("eo|"), "the lines of the server's log are told by it"
