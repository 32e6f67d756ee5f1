"""What the roles may do: all that the product's statements need, nothing more, and how it is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import Connection, create_engine, exc, make_url, text

from eoframework.db import grants, migrating, readiness
from eoframework.db.grants import Purpose, Roles
from eoframework.db.session import Database, open_database
from eoframework.errors import ConfigurationError, EoError, NotFound
from eoframework.schema import Schema
from tests.cli.conftest import Shell
from tests.roles import conftest
from tests.roles.conftest import logged_in
from tests.roles.statements import all_statements

DENIED = "permission denied|must be owner"


@contextmanager
def connected(roles: conftest.Roles, url: str, purpose: str) -> Iterator[Connection]:
    engine = create_engine(roles.url(url, purpose), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def denied(connection: Connection, statement: str) -> bool:
    """Whether the server refuses it for lack of a right; EXPLAIN asks for the same rights and changes nothing."""
    try:
        with connection.begin_nested():
            connection.exec_driver_sql(f"EXPLAIN {statement}", execution_options={"no_parameters": True})
    except exc.ProgrammingError as error:
        if "permission denied" in str(error):
            return True
        raise
    return False


def test_every_statement_of_the_product_is_allowed(granted: Database, roles: conftest.Roles) -> None:
    """Seen to fail with any right of the app or the relay left out of db/grants.py; the next test does just that."""
    refused, asked = [], 0
    with granted.engine.begin() as connection:
        for purpose, module, statement in all_statements():
            connection.exec_driver_sql(f"SET LOCAL ROLE {getattr(roles, purpose)}")
            refused += [(purpose, module, statement)] * denied(connection, statement)
            asked += 1
    assert refused == []
    assert asked > 130


def test_what_only_the_owner_may_declare(superuser: Shell, roles: conftest.Roles, granted: Database) -> None:
    assert granted
    for command in (("db", "adopt", "replacement"), ("outbox", "adopt")):
        for purpose in ("app", "observer"):
            said = logged_in(superuser, roles, purpose).run(*command, code=3).stderr
            assert f"Log in as {roles.owner}" in said
    logged_in(superuser, roles, "owner").run("db", "adopt", "replacement")


@pytest.mark.parametrize("purpose", ["app", "relay"])
def test_no_right_is_superfluous(granted: Database, roles: conftest.Roles, purpose: Purpose) -> None:
    """Each right taken away makes some statement fail: what nobody needs, nobody has."""
    role, spare = getattr(roles, purpose), []
    statements = [statement for whose, _, statement in all_statements() if whose == purpose]
    for right in grants.rights(purpose):
        if right.table == "alembic_version":
            continue  # read through alembic; test_without_any_right has it
        columns = f"({', '.join(right.columns)})" if right.columns else ""
        with granted.engine.connect() as connection, connection.begin() as transaction:
            connection.exec_driver_sql(f'REVOKE {right.privilege} {columns} ON eo."{right.table}" FROM {role}')
            connection.exec_driver_sql(f"SET LOCAL ROLE {role}")
            if not any(denied(connection, statement) for statement in statements if right.table in statement):
                spare.append(str(right))
            transaction.rollback()
    assert spare == []


def test_a_missing_right_is_named(granted: Database, url: str, roles: conftest.Roles) -> None:
    """`eo db check` and the start of `eo run` say the same as the grants."""
    for purpose in grants.PURPOSES:
        role = getattr(roles, purpose)
        theirs = open_database(roles.url(url, purpose), Schema())
        readiness.check_rights(theirs, purpose)
        lacking = grants.rights(purpose)[-1]
        with granted.begin("test") as connection:
            connection.execute(text(f"REVOKE {lacking.privilege} ON eo.{lacking.table} FROM {role}"))
        with pytest.raises(ConfigurationError) as raised:
            readiness.check_rights(theirs, purpose)
        assert str(lacking) in raised.value.what
        assert f"eo db grants --{purpose} {role} --apply" in raised.value.remedy
        grants.apply(granted, Roles(**{purpose: role}))
        readiness.check_rights(theirs, purpose)
        theirs.engine.dispose()


def test_without_any_right(superuser: Shell, roles: conftest.Roles, url: str, granted: Database) -> None:
    with granted.begin("test") as connection:
        connection.execute(text(f"REVOKE USAGE ON SCHEMA eo FROM {roles.app}"))
    said = logged_in(superuser, roles, "app").run("db", "check", code=3).stderr
    assert f"eo db grants --app {roles.app} --apply" in said
    said = logged_in(superuser, roles, "app").run("run", "tests.cli.shop:app", code=3).stderr
    assert f"eo db grants --app {roles.app} --apply" in said
    logged_in(superuser, roles, "owner").run("db", "grants", "--app", roles.app, "--apply")
    logged_in(superuser, roles, "app").run("db", "check")


@pytest.mark.parametrize(
    ("purpose", "statement"),
    [
        ("app", "CREATE TABLE eo.mine (i int)"),
        ("app", "ALTER TABLE eo.position ADD COLUMN mine int"),
        ("app", "DROP TABLE eo.processed_message"),
        ("app", "TRUNCATE eo.processed_message"),
        ("app", "CREATE TABLE public.mine (i int)"),
        ("app", "DELETE FROM eo.outbox_message"),
        ("app", "UPDATE eo.outbox_message SET topic = 'elsewhere'"),
        ("app", "UPDATE eo.outbox SET id = gen_random_uuid()"),
        ("app", "UPDATE eo.relay_shard SET epoch = epoch + 1"),
        ("app", "DELETE FROM eo.audit"),
        ("app", "UPDATE eo.alembic_version SET version_num = 'eo0001'"),
        ("relay", "ALTER TABLE eo.outbox_message ADD COLUMN mine int"),
        ("relay", "SELECT * FROM public.booking"),
        ("relay", "SELECT * FROM eo.position"),
        ("relay", "UPDATE eo.position SET next_offset = 0"),
        ("relay", "SELECT * FROM eo.processed_message"),
        ("relay", "SELECT payload FROM eo.dead_letter"),
        ("relay", "DELETE FROM eo.dead_letter"),
        ("relay", "UPDATE eo.outbox_message SET payload = ''"),
        ("relay", "INSERT INTO eo.audit (actor, action, subject, detail) VALUES ('', '', '', '{}')"),
        ("observer", "SELECT payload FROM eo.outbox_message"),
        ("observer", "SELECT headers FROM eo.delayed_message"),
        ("observer", "SELECT * FROM eo.dead_letter"),
        ("observer", "SELECT value FROM eo.parked_message"),
        ("observer", "SELECT error FROM eo.attempt"),
        ("observer", "SELECT result FROM eo.external_call"),
        ("observer", "SELECT detail FROM eo.audit"),
        ("observer", "SELECT * FROM public.booking"),
        ("observer", "INSERT INTO eo.outbox (shards) VALUES (1)"),
        ("observer", "DELETE FROM eo.position"),
        ("observer", "SELECT FROM eo.position FOR UPDATE"),
    ],
)
def test_what_is_refused(url: str, roles: conftest.Roles, purpose: str, statement: str) -> None:
    """Seen to fail for the observer with `--payloads`, and for app and relay with GRANT ALL in db/grants.py."""
    with connected(roles, url, purpose) as connection, pytest.raises(exc.ProgrammingError, match=DENIED):
        connection.exec_driver_sql(statement, execution_options={"no_parameters": True})


def test_what_locks_a_row_cannot_change_it(url: str, roles: conftest.Roles) -> None:
    """The relay's UPDATE (seq): the column can be given nothing but its next number."""
    with connected(roles, url, "relay") as connection:
        connection.exec_driver_sql("SELECT seq FROM eo.outbox_message FOR UPDATE")
        with pytest.raises(exc.ProgrammingError, match="can only be updated to DEFAULT"):
            connection.exec_driver_sql("UPDATE eo.outbox_message SET seq = 1")


def test_an_observer_with_payloads_reads_everything(superuser: Shell, url: str, roles: conftest.Roles) -> None:
    owner = logged_in(superuser, roles, "owner")
    owner.run("db", "grants", "--observer", roles.observer, "--payloads", "--apply")
    with connected(roles, url, "observer") as connection:
        for table in grants.TABLES:
            connection.exec_driver_sql(f'SELECT * FROM eo."{table}" LIMIT 1')
    owner.run("db", "grants", "--observer", roles.observer, "--apply")
    with connected(roles, url, "observer") as connection, pytest.raises(exc.ProgrammingError, match=DENIED):
        connection.exec_driver_sql("SELECT payload FROM eo.dead_letter")


def test_every_column_was_decided_on(granted: Database) -> None:
    """A version that adds a table or a column must say who sees it."""
    hidden = {"payload", "value", "headers", "error", "traceback", "unreadable", "result", "detail"}
    with granted.engine.connect() as connection:
        found = connection.execute(
            text("SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'eo'")
        )
        columns = {(row[0], row[1]) for row in found}
    assert {table for table, _ in columns} == set(grants.TABLES)
    listed = {right.table: right.columns for right in grants.rights("observer")}
    shown = {(table, column) for table, column in columns if not listed[table] or column in listed[table]}
    assert {column for _, column in columns - shown} == hidden
    assert {column for _, column in shown} & hidden == set()
    assert {(table, column) for table, names in listed.items() for column in names} <= columns


def test_it_is_printed_without_a_database(superuser: Shell, roles: conftest.Roles) -> None:
    """And what is printed does the same as --apply, whatever the role had before."""
    nowhere = {"EO_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}
    asked = ("db", "grants", "--relay", roles.relay, "--observer", roles.observer)
    printed = superuser.run(*asked, **nowhere).stdout
    assert printed == superuser.run(*asked, **nowhere).stdout
    document = json.loads(superuser.run(*asked, "--json", **nowhere).stdout)
    assert [f"{line};" for line in document["statements"]] == [
        line for line in printed.splitlines() if line.startswith(("GRANT", "REVOKE"))
    ]
    with superuser.database.begin("test") as connection:
        connection.execute(text(f"GRANT ALL ON ALL TABLES IN SCHEMA eo TO {roles.relay}"))
        assert rights_of(connection, roles.relay) > {("position", "UPDATE")}
    raw = superuser.database.engine.raw_connection()
    raw.cursor().execute(printed)
    raw.close()
    with superuser.database.begin("test") as connection:
        assert rights_of(connection, roles.relay) == {
            (right.table, right.privilege) for right in grants.rights("relay") if not right.columns
        }


def rights_of(connection: Connection, role: str) -> set[tuple[str, str]]:
    found = connection.execute(
        text("SELECT table_name, privilege_type FROM information_schema.role_table_grants WHERE grantee = :role"),
        {"role": role},
    )
    return {(row[0], row[1]) for row in found}


class TestRefusals:
    def test_a_role_that_does_not_exist(self, granted: Database) -> None:
        with pytest.raises(NotFound, match=r"no role 'no\"body'.*CREATE ROLE \"no\"\"body\""):
            grants.apply(granted, Roles(app='no"body'))

    def test_a_role_that_could_alter_the_tables(self, granted: Database, roles: conftest.Roles) -> None:
        with pytest.raises(ConfigurationError, match="could alter them"):
            grants.apply(granted, Roles(app=roles.owner))
        with pytest.raises(ConfigurationError, match="owner and something else"):
            Roles(owner=roles.owner, app=roles.owner)

    def test_who_does_not_own_the_tables(self, superuser: Shell, roles: conftest.Roles) -> None:
        said = logged_in(superuser, roles, "app").run("db", "grants", "--relay", roles.relay, "--apply", code=3).stderr
        assert f"belong to '{roles.owner}'" in said

    def test_nobody_named(self, superuser: Shell) -> None:
        assert "Give --owner, --app" in superuser.run("db", "grants", code=3).stderr

    def test_the_app_does_not_migrate(self, url: str, roles: conftest.Roles) -> None:
        theirs = open_database(roles.url(url, "app"), Schema())
        with pytest.raises(EoError, match=DENIED):
            migrating.downgrade(theirs, "base")
        theirs.engine.dispose()


def test_a_schema_shared_with_the_application(bare_url: str, roles: conftest.Roles) -> None:
    """Seen to fail with REVOKE ... ON ALL TABLES IN SCHEMA: the app lost the rights on its own table."""
    shared = open_database(make_url(bare_url).render_as_string(hide_password=False), Schema("public"))
    migrating.upgrade(shared)
    grants.apply(shared, Roles(owner=roles.owner, app=roles.app))
    with connected(roles, bare_url, "app") as connection:
        connection.exec_driver_sql("INSERT INTO booking VALUES (1, 1)")
        connection.exec_driver_sql("SELECT FROM public.position")
    migrating.downgrade(shared, "base")
    shared.engine.dispose()
