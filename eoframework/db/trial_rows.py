"""What a transaction has changed so far, row by row, and a lock on its COMMIT.

New versions are the rows whose xmin is not older than our transaction: its snapshot hides what others committed since,
and the savepoints' own transaction numbers are higher. The versions before are read by a second transaction on the
same snapshot. (PostgreSQL manual, "System Columns", "Snapshot Synchronization Functions".)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, CursorResult, Engine, exc

from eoframework.db.faults import sqlstate_of
from eoframework.db.links import connected
from eoframework.errors import ConfigurationError

ChangeKind = Literal["insert", "update", "delete", "write"]
Row = Mapping[str, Any]

# Whoever sends COMMIT, by whatever way past the guards of the client, gets an error from the server instead.
_GUARD = """
CREATE TEMPORARY TABLE eo_trial (only_one int UNIQUE DEFERRABLE INITIALLY DEFERRED) ON COMMIT DROP;
INSERT INTO pg_temp.eo_trial VALUES (1), (1)
"""
# As at a COMMIT: deferred constraints of the application's own may refuse what the handler did.
_CHECK = "DELETE FROM pg_temp.eo_trial; SET CONSTRAINTS ALL IMMEDIATE"
# Earlier transactions of the same connection are counted too as long as the server has not collected their numbers.
_COUNTS = "SELECT relid, n_tup_ins, n_tup_upd, n_tup_del FROM pg_stat_xact_user_tables"
_TOUCHED = """
SELECT s.relid, format('%I.%I', s.schemaname, s.relname) AS name, s.n_tup_ins, s.n_tup_upd, s.n_tup_del,
    age(c.xmin) BETWEEN -10000000 AND 0 AS rewritten,
    coalesce((SELECT json_agg(json_build_array(quote_ident(a.attname), format_type(a.atttypid, a.atttypmod))
            ORDER BY a.attnum) FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid
            AND a.attnum = ANY(i.indkey) WHERE i.indrelid = s.relid AND i.indisprimary), '[]') AS key
FROM pg_stat_xact_user_tables s JOIN pg_class c ON c.oid = s.relid
WHERE c.relkind = 'r' AND NOT starts_with(s.schemaname, 'pg_temp') AND (s.n_tup_ins + s.n_tup_upd + s.n_tup_del > 0
    OR age(c.xmin) BETWEEN -10000000 AND 0)
ORDER BY name
"""
# age() counts from our own number, so it is 0 or less for what is ours; far below 0 are numbers of the last turn.
_NEW = "SELECT to_json(t), {key} FROM ONLY {table} t WHERE age(t.xmin) BETWEEN -10000000 AND 0 LIMIT %(limit)s"
_OLD = "SELECT to_json(t) FROM ONLY {table} t WHERE {match}"
# A deleted row's old version carries its deleter in xmax; so does one that was only locked. Where others have it locked
# too, xmax is a number of another kind: then it is one among all that anybody ever locked.
_OURS = "SELECT to_json(t), {key} FROM ONLY {table} t WHERE age(t.xmax) BETWEEN -10000000 AND 0"
_SUSPECTS = "SELECT to_json(t), {key} FROM ONLY {table} t WHERE t.xmax <> '0'::xid"
_ALL = "SELECT to_json(t), {key} FROM ONLY {table} t"
_STILL_THERE = "SELECT EXISTS (SELECT FROM ONLY {table} t WHERE {match})"

# Each costs a round trip.
_SEARCH = 10_000

_NOT_ALLOWED = "42501"
_UNREADABLE = {
    _NOT_ALLOWED: "the database role may not read it",
    "42P01": "it was not there before",
    "55P03": "it is locked as a whole (TRUNCATE, or a change of its definition)",
    "57014": "it is too large to be searched within EO_STATEMENT_TIMEOUT",
}


@dataclass(frozen=True, slots=True)
class RowChange:
    """One row before and after; `write` where the table has no primary key by which to find it before."""

    kind: ChangeKind
    before: Row | None
    after: Row | None


@dataclass(frozen=True, slots=True)
class TableChanges:
    """What changed in one table; a partition is a table of its own."""

    table: str
    changes: tuple[RowChange, ...]
    more: bool = False
    """Whether there are more changes than were asked for."""
    note: str = ""
    """What could not be found out, and why."""


@dataclass(frozen=True, slots=True)
class _Table:
    key: list[tuple[str, str]]
    """The columns of the primary key and their types."""
    name: str
    inserted: int
    updated: int
    deleted: int
    rewritten: bool

    @property
    def written(self) -> bool:
        return self.rewritten or self.inserted + self.updated + self.deleted > 0

    def sql(self, template: str) -> str:
        """`template` for this table; key values travel as text, whatever their type."""
        columns = ", ".join(f"t.{name}::text" for name, _ in self.key) or "NULL"
        match = " AND ".join(f"t.{name} = CAST(%(k{i})s AS {kind})" for i, (name, kind) in enumerate(self.key))
        names = {"{table}": self.name.replace("%", "%%"), "{key}": columns, "{match}": match}
        for mark, text in names.items():
            template = template.replace(mark, text)
        return template


@dataclass(frozen=True, slots=True)
class _Gone:
    changes: list[RowChange]
    searched_all: bool


class RowWatch:
    """Compares inside one REPEATABLE READ transaction; nothing of it is ever committed."""

    def __init__(self, connection: Connection, *, limit: int) -> None:
        """Must be the first user of the transaction: what was written before it would count as the handler's.

        Raises ConfigurationError when the server or the role does not allow it.
        """
        if connection.exec_driver_sql("SHOW track_counts").scalar_one() != "on":
            raise ConfigurationError(
                "PostgreSQL's track_counts is off: nobody could tell which tables a handler writes.",
                remedy="Switch it on, as it is by default.",
            )
        self._limit = limit
        self._connection = connection
        self._earlier = {row[0]: row[1:] for row in connection.exec_driver_sql(_COUNTS)}
        self._snapshot = str(connection.exec_driver_sql("SELECT pg_export_snapshot()").scalar_one())
        try:
            _script(connection, _GUARD)
        except exc.ProgrammingError as error:
            if sqlstate_of(error) != _NOT_ALLOWED:
                raise
            raise ConfigurationError(
                "the database role may not create temporary tables; one of them keeps a trial from being committed.",
                remedy="As owner: GRANT TEMPORARY ON DATABASE name TO role;",
            ) from error

    def check_constraints(self) -> None:
        """Check deferred constraints as a COMMIT would; the lock on COMMIT is gone then."""
        _script(self._connection, _CHECK)

    def changes(self, engine: Engine) -> tuple[TableChanges, ...]:
        """Every table of the application that was written, with at most `limit` of its rows."""
        tables = [self._written(row) for row in _script(self._connection, _TOUCHED)]
        with self._before(engine) as before:
            found = [self._table(table, before) for table in tables if table.written]
        return tuple(table for table in found if table.changes or table.note)

    def _written(self, row: Any) -> _Table:
        earlier = self._earlier.get(row.relid, (0, 0, 0))
        inserted, updated, deleted = (now - then for now, then in zip(row[2:5], earlier, strict=True))
        key = [(name, kind) for name, kind in row.key]
        return _Table(key, row.name, inserted, updated, deleted, row.rewritten)

    @contextmanager
    def _before(self, engine: Engine) -> Iterator[Connection]:
        with connected(engine) as connection:
            connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                _script(connection, f"SET TRANSACTION SNAPSHOT '{self._snapshot}'")
                # The other side of such a lock is our own transaction, which waits for this one.
                _script(connection, "SET LOCAL lock_timeout = '500ms'; SET TRANSACTION READ ONLY")
                yield connection

    def _table(self, table: _Table, before: Connection) -> TableChanges:
        try:
            with self._connection.begin_nested(), before.begin_nested():
                return self._compare(table, before)
        except exc.DBAPIError as error:
            why = _UNREADABLE.get(sqlstate_of(error) or "")
            if why is None:
                raise
            counts = f"{table.inserted} inserts, {table.updated} updates, {table.deleted} deletes"
            return TableChanges(table.name, (), note=f"{why}; {counts}")

    def _compare(self, table: _Table, before: Connection) -> TableChanges:
        fresh = self._connection.exec_driver_sql(table.sql(_NEW), {"limit": self._limit + 1}).all()
        if not table.key:
            return self._without_key(table, fresh)
        changes = [_changed(_first(before, table, row[1:]), row[0]) for row in fresh]
        # A changed primary key is a row that is gone and one that is new.
        rekeyed = max(0, sum(change.kind == "insert" for change in changes) - table.inserted)
        gone = _Gone([], searched_all=True)
        if table.deleted or table.rewritten or rekeyed:
            gone = self._gone(table, before, expected=table.deleted + rekeyed)
        real = [change for change in (*changes, *gone.changes) if change.before != change.after]
        note = "" if gone.searched_all else f"{table.deleted} rows were deleted; the others of them were not found"
        return TableChanges(table.name, tuple(real[: self._limit]), more=len(real) > self._limit, note=note)

    def _gone(self, table: _Table, before: Connection, *, expected: int) -> _Gone:
        """The rows that are not there any more. A row made and deleted in this transaction was expected in vain."""
        searches = (_ALL,) if table.rewritten else (_OURS, _SUSPECTS)
        gone: dict[tuple[str, ...], RowChange] = {}
        searched = 0
        for search in searches:
            searched = 0
            streamed = {"stream_results": True, "max_row_buffer": 500}
            with before.exec_driver_sql(table.sql(search), {}, execution_options=streamed) as suspects:
                for row in suspects:
                    key, searched = tuple(row[1:]), searched + 1
                    if key not in gone and not self._is_there(table, key):
                        gone[key] = RowChange("delete", row[0], None)
                    if len(gone) in (expected, self._limit + 1):
                        return _Gone([*gone.values()], searched_all=True)
                    if searched == _SEARCH:
                        break
        return _Gone([*gone.values()], searched_all=searched < _SEARCH)

    def _is_there(self, table: _Table, key: Sequence[str]) -> bool:
        return bool(self._connection.exec_driver_sql(table.sql(_STILL_THERE), _key(key)).scalar_one())

    def _without_key(self, table: _Table, fresh: Sequence[Any]) -> TableChanges:
        only_new = not (table.updated or table.deleted or table.rewritten)
        kind: ChangeKind = "insert" if only_new else "write"
        note = (
            "" if only_new else f"no primary key to find the rows before: {table.updated} updated, {table.deleted} gone"
        )
        changes = tuple(RowChange(kind, None, row[0]) for row in fresh[: self._limit])
        return TableChanges(table.name, changes, more=len(fresh) > self._limit, note=note)


def _first(before: Connection, table: _Table, key: Sequence[str]) -> Row | None:
    found: Row | None = before.exec_driver_sql(table.sql(_OLD), _key(key)).scalar_one_or_none()
    return found


def _changed(before: Row | None, after: Row) -> RowChange:
    return RowChange("insert" if before is None else "update", before, after)


def _key(values: Sequence[str]) -> dict[str, object]:
    return {f"k{index}": value for index, value in enumerate(values)}


def _script(connection: Connection, statements: str) -> CursorResult[Any]:
    # Without parameters the server takes several statements at once, and a % is a %.
    return connection.exec_driver_sql(statements, execution_options={"no_parameters": True})
