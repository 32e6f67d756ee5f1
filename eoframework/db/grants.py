"""Who may do what with our tables: four roles, and nothing that their work does not need.

owner      owns schema and tables: `eo db upgrade`, `eo db grants`
app        `eo run`, `app.publish`, and the commands of operators; changes no table's definition
relay      `eo relay`: the outbox alone
observer   reads what stands where; payloads only if that was asked for
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Final, Literal, get_args

from sqlalchemy import Connection

from eoframework import events
from eoframework.db.joined import COPY, VERSION_TABLE, is_joined
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, NotFound
from eoframework.schema import Schema

Purpose = Literal["app", "relay", "observer"]
PURPOSES: Final[tuple[Purpose, ...]] = get_args(Purpose)

_ALL: Final = "SELECT INSERT UPDATE DELETE"
# The app only ever adds to the outbox and to the audit: no statement of a handler can take back what was published, or
# what an operator did.
_APP: Final = {
    "alembic_version": "SELECT",
    "attempt": _ALL,
    "audit": "SELECT INSERT",
    "consumer": "SELECT INSERT UPDATE",
    "coverage": "SELECT INSERT UPDATE",
    "dead_letter": _ALL,
    "delayed_message": "SELECT INSERT DELETE",
    "external_call": _ALL,
    "outbox": "SELECT",
    "outbox_held": "SELECT DELETE",
    "outbox_message": "SELECT INSERT",
    "parked_key": _ALL,
    "parked_message": _ALL,
    "position": _ALL,
    "position_sample": _ALL,
    "processed_message": _ALL,
    "relay_shard": "SELECT",
    "transform_start": _ALL,
}
# UPDATE of one column: to lock a row wants the right to change some column of it, and this one, GENERATED ALWAYS, can
# be set to nothing but its next number. Of the dead letters it sees what it has to tell about the one it has written.
_RELAY: Final = {
    "alembic_version": "SELECT",
    "dead_letter": "INSERT SELECT(id,topic,key,holds)",
    "delayed_message": "SELECT DELETE UPDATE(seq)",
    "outbox": "SELECT",
    "outbox_held": "SELECT INSERT",
    "outbox_message": "SELECT INSERT DELETE UPDATE(seq)",
    "relay_member": _ALL,
    "relay_shard": "SELECT UPDATE",
}
# Without payloads: neither those nor what may quote them. Keys are shown: which one waits is what an observer asks.
_OBSERVER: Final = {
    "alembic_version": "SELECT",
    "attempt": "SELECT(consumer_id,topic_id,partition,offset,attempts,crashes,first_failed_at,last_failed_at,"
    "error_class,fingerprint)",
    "audit": "SELECT(id,at,actor,action,subject)",
    "consumer": "SELECT",
    "coverage": "SELECT",
    "dead_letter": "SELECT(id,origin,message_id,topic,key,type,source,content_type,traceparent,created_at,cause,"
    "died_at,consumer_id,topic_id,partition,offset,lane,timestamp,has_id,holds,attempts,crashes,first_failed_at,"
    "last_failed_at,error_class,fingerprint,outbox_seq)",
    "delayed_message": "SELECT(seq,id,shard,topic,key,type,source,content_type,traceparent,created_at,deliver_at)",
    "external_call": "SELECT(consumer_id,message_id,name,id,partition,offset,fence,calls,owner,lease_until,claimed_at,"
    "done_at,settled_at,error_class)",
    "outbox": "SELECT",
    "outbox_held": "SELECT",
    "outbox_message": "SELECT(seq,id,shard,topic,key,type,source,content_type,traceparent,created_at)",
    "parked_key": "SELECT",
    "parked_message": "SELECT(consumer_id,topic_id,partition,lane,offset,topic,message_id,key,timestamp,parked_at,"
    "attempts,crashes,first_failed_at,last_failed_at,error_class,fingerprint)",
    "position": "SELECT",
    "position_sample": "SELECT",
    "processed_message": "SELECT",
    "relay_member": "SELECT",
    "relay_shard": "SELECT",
    "transform_start": "SELECT",
}
TABLES: Final = tuple(_OBSERVER)
"""All of ours, by name."""
_RIGHTS: Final[Mapping[Purpose, Mapping[str, str]]] = {"app": _APP, "relay": _RELAY, "observer": _OBSERVER}
_RIGHT: Final = re.compile(r"([A-Z]+)(?:\(([^)]*)\))?")
_FOR: Final[Mapping[Purpose, str]] = {
    "app": "eo run, app.publish and the commands of operators",
    "relay": "eo relay: the outbox alone",
    "observer": "reads; no payloads, headers, error texts and results",
}

_HOLDS: Final = """
SELECT w.table_name, w.privilege, w.column_name
FROM unnest(%(tables)s::text[], %(privileges)s::text[], %(columns)s::text[]) AS w(table_name, privilege, column_name)
    LEFT JOIN pg_class c ON c.relname = w.table_name AND c.relkind IN ('r', 'p')
        AND c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = %(schema)s)
WHERE NOT coalesce(CASE WHEN w.column_name IS NULL THEN has_table_privilege(%(role)s::name, c.oid, w.privilege)
    ELSE has_column_privilege(%(role)s::name, c.oid, w.column_name, w.privilege) END, false)
ORDER BY 1, 2, 3
"""
_USAGE: Final = """
SELECT has_schema_privilege(%(role)s::name, oid, 'USAGE') FROM pg_namespace WHERE nspname = %(schema)s
"""
_OWNERS: Final = """
SELECT DISTINCT pg_get_userbyid(c.relowner) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relkind IN ('r', 'p') ORDER BY 1
"""
_MAY_ACT_AS: Final = "SELECT pg_has_role(%(role)s::name, %(owner)s::name, 'MEMBER')"
# The lock of migrations/env.py: tables are not made while rights on them are given.
_ALONE: Final = "SELECT pg_advisory_xact_lock(1701801265, hashtext(%(schema)s))"


@dataclass(frozen=True, slots=True)
class Right:
    """One privilege on one of our tables, or on some columns of it."""

    table: str
    privilege: str
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        columns = f" ({', '.join(self.columns)})" if self.columns else ""
        return f"{self.privilege}{columns} on {self.table}"


@dataclass(frozen=True, slots=True)
class Roles:
    """The names of existing roles; None leaves a purpose out. One role may serve several, but none the owner's too."""

    owner: str | None = None
    app: str | None = None
    relay: str | None = None
    observer: str | None = None

    def __post_init__(self) -> None:
        named = [name for field in fields(self) if (name := getattr(self, field.name)) is not None]
        if not named or not all(named) or any("\0" in name for name in named):
            raise ConfigurationError("no role is named.", remedy="Give --owner, --app, --relay or --observer ROLE.")
        if self.owner is not None and named.count(self.owner) > 1:
            raise ConfigurationError(
                f"role {self.owner!r} would be the owner and something else.",
                remedy="Give the owner a role of its own: an app that logs in as the owner can alter the tables.",
            )

    def given(self) -> dict[Purpose, str]:
        """Purpose -> role, without the owner."""
        return {purpose: role for purpose in PURPOSES if (role := getattr(self, purpose)) is not None}


def rights(purpose: Purpose, *, payloads: bool = False, joined: bool = False) -> list[Right]:
    """What the role needs on our tables, by table. payloads: for the observer, all columns."""
    found = []
    for name, words in sorted(_RIGHTS[purpose].items()):
        table = _table(name, joined=joined)
        for privilege, columns in _RIGHT.findall(words):
            whole = not columns or (payloads and purpose == "observer")
            found.append(Right(table, privilege, () if whole else tuple(columns.split(","))))
    return found


def statements(schema: Schema, roles: Roles, *, payloads: bool = False, joined: bool = False) -> list[str]:
    """The SQL, always the same for the same roles: afterwards each has these rights on our tables and no others."""
    ours = [_table(name, joined=joined) for name in TABLES]
    found = _owner_statements(schema, roles.owner, ours) if roles.owner is not None else []
    eo = _quoted(schema.name)
    # By name, not ALL TABLES IN SCHEMA: the schema may be one that the application's own tables are in.
    tables = ", ".join(f"{eo}.{_quoted(table)}" for table in ours)
    found += [f"REVOKE ALL ON {tables} FROM {_quoted(role)}" for role in dict.fromkeys(roles.given().values())]
    for purpose, role in roles.given().items():
        found.append(f"GRANT USAGE ON SCHEMA {eo} TO {_quoted(role)}")
        found += _grants(schema, role, rights(purpose, payloads=payloads, joined=joined))
    return found


def script(schema: Schema, roles: Roles, *, payloads: bool = False, joined: bool = False) -> str:
    """The statements as one transaction, with what they are for and what they leave to the DBA."""
    made = statements(schema, roles, payloads=payloads, joined=joined)
    lines = [f"-- {name}: {_FOR[name]}" for name in roles.given()]
    if roles.owner is not None:
        lines.insert(0, "-- owner: eo db upgrade, eo db grants")
    if payloads:
        lines = [line.replace(_FOR["observer"], "reads, payloads too") for line in lines]
    lines += ["BEGIN;", *(f"{statement};" for statement in made), "COMMIT;"]
    return "\n".join([*lines, *(f"-- {note}" for note in notes(roles))])


def notes(roles: Roles) -> list[str]:
    """What is not granted, because it is not ours to grant or because not everybody needs it."""
    found = []
    if roles.app is not None:
        app = _quoted(roles.app)
        found.append(f"The rights on your own tables, which the handlers use, are yours to grant to {app}.")
        found.append(f"eo dead try, where PUBLIC may not: GRANT TEMPORARY ON DATABASE ... TO {app};")
        found.append(
            "Workers of one app that log in as several roles, to end a frozen owner of a partition: "
            f"GRANT pg_read_all_stats, pg_signal_backend TO {app};"
        )
    watching = [_quoted(role) for role in dict.fromkeys((roles.relay, roles.observer)) if role is not None]
    if watching:
        found.append(
            "To see how old the transactions of other roles are (eo outbox stats, the relay's warning): "
            f"GRANT pg_read_all_stats TO {', '.join(watching)};"
        )
    return found


def missing(connection: Connection, schema: Schema, purpose: Purpose, *, role: str | None = None) -> list[str]:
    """What the role (default: the session's) lacks for its purpose, in words; empty when it has all."""
    who = role or connection.exec_driver_sql("SELECT current_user::text").scalar_one()
    if not connection.exec_driver_sql(_USAGE, {"role": who, "schema": schema.name}).scalar_one_or_none():
        return [f"USAGE on schema {schema.name}"]
    needed = rights(purpose, joined=is_joined(connection, schema))
    wanted = [(r.table, r.privilege, column) for r in needed for column in (r.columns or (None,))]
    tables, privileges, columns = (list(part) for part in zip(*wanted, strict=True))
    values = {"tables": tables, "privileges": privileges, "columns": columns, "schema": schema.name, "role": who}
    lacking: dict[tuple[str, str], list[str]] = {}
    for table, privilege, column in connection.exec_driver_sql(_HOLDS, values):
        lacking.setdefault((table, privilege), []).extend([column] if column is not None else [])
    return [str(Right(table, privilege, tuple(names))) for (table, privilege), names in lacking.items()]


def apply(database: Database, roles: Roles, *, payloads: bool = False) -> None:
    """Give each role its rights and take all others on our schema from it, in one transaction.

    On a crash: all of it or nothing; processes that are at work do not notice. Raises NotFound for a role that does
    not exist, ConfigurationError for one that owns the tables, and when the session's role may not grant.
    """
    schema = database.schema
    with database.brief("granting rights", lock_wait=10) as connection:
        connection.exec_driver_sql(_ALONE, {"schema": schema.name})
        _refuse_unknown(connection, roles)
        if roles.owner is None:
            _refuse_stranger(connection, schema)
        joined = is_joined(connection, schema)
        made = statements(schema, roles, payloads=payloads, joined=joined)
        for statement in _needed(connection, schema, made):
            # No parameters: a role may have a % in its name.
            connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
        for purpose, role in roles.given().items():
            _refuse_owner(connection, schema, role)
            lacking = missing(connection, schema, purpose, role=role)
            if lacking:
                raise ConfigurationError(
                    f"{role!r} still lacks {', '.join(lacking)}; nothing was granted.", remedy="Run: eo db upgrade"
                )
        events.emit("grants.applying", roles=sorted(roles.given().values()))
    events.emit("grants.applied", roles=sorted(roles.given().values()))


def _table(name: str, *, joined: bool) -> str:
    return COPY if joined and name == VERSION_TABLE else name


def _owner_statements(schema: Schema, owner: str, tables: Iterable[str]) -> list[str]:
    eo, role = _quoted(schema.name), _quoted(owner)
    made = [f"CREATE SCHEMA IF NOT EXISTS {eo} AUTHORIZATION {role}", f"ALTER SCHEMA {eo} OWNER TO {role}"]
    if schema.name == "public":
        made = [f"GRANT USAGE, CREATE ON SCHEMA {eo} TO {role}"]
    return made + [f"ALTER TABLE IF EXISTS {eo}.{_quoted(table)} OWNER TO {role}" for table in tables]


def _grants(schema: Schema, role: str, wanted: Iterable[Right]) -> list[str]:
    by_table: dict[str, list[str]] = {}
    for right in wanted:
        columns = f" ({', '.join(map(_quoted, right.columns))})" if right.columns else ""
        by_table.setdefault(right.table, []).append(right.privilege + columns)
    eo, to = _quoted(schema.name), _quoted(role)
    return [f"GRANT {', '.join(words)} ON {eo}.{_quoted(table)} TO {to}" for table, words in by_table.items()]


def _needed(connection: Connection, schema: Schema, wanted: Collection[str]) -> list[str]:
    """Without the changes of owner that change nothing: each would wait until nobody uses the table."""
    found = connection.exec_driver_sql(
        """SELECT c.relname, pg_get_userbyid(c.relowner) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE n.nspname = %(schema)s AND c.relkind IN ('r', 'p')""",
        {"schema": schema.name},
    )
    eo = _quoted(schema.name)
    done = {f"ALTER TABLE IF EXISTS {eo}.{_quoted(row[0])} OWNER TO {_quoted(row[1])}" for row in found}
    return [statement for statement in wanted if statement not in done]


def _refuse_unknown(connection: Connection, roles: Roles) -> None:
    named = [name for field in fields(roles) if (name := getattr(roles, field.name)) is not None]
    known = connection.exec_driver_sql(
        "SELECT rolname FROM pg_roles WHERE rolname = ANY (%(names)s::text[])", {"names": named}
    ).scalars()
    lacking = sorted(set(named) - set(known))
    if lacking:
        raise NotFound(
            f"the server has no role {', '.join(map(repr, lacking))}.",
            remedy=f"Create it: CREATE ROLE {_quoted(lacking[0])} LOGIN PASSWORD '...';",
        )


def _refuse_stranger(connection: Connection, schema: Schema) -> None:
    me = connection.exec_driver_sql("SELECT current_user::text").scalar_one()
    for (owner,) in connection.exec_driver_sql(_OWNERS, {"schema": schema.name}):
        if not connection.exec_driver_sql(_MAY_ACT_AS, {"role": me, "owner": owner}).scalar_one():
            raise ConfigurationError(
                f"{me!r} may not grant rights on schema {schema.name!r}: its tables belong to {owner!r}.",
                remedy=f"Log in as {owner} (EO_DATABASE_URL), or let a DBA run what is printed without --apply.",
            )


def _refuse_owner(connection: Connection, schema: Schema, role: str) -> None:
    for (owner,) in connection.exec_driver_sql(_OWNERS, {"schema": schema.name}):
        if connection.exec_driver_sql(_MAY_ACT_AS, {"role": role, "owner": owner}).scalar_one():
            raise ConfigurationError(
                f"{role!r} is a superuser, or acts as {owner!r}, who owns the tables: it could alter them. Nothing was "
                "granted.",
                remedy="Give the processes roles of their own, or the tables another owner: --owner ROLE.",
            )


def _quoted(name: str) -> str:
    escaped = name.replace('"', '""')
    return f'"{escaped}"'
