"""alembic's environment: our own schema and version table, whoever starts it (alembic, `eo db`)."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, create_engine, text

from eoframework.schema import Schema
from eoframework.settings import Settings

config = context.config


def _schema() -> Schema:
    schema = config.attributes.get("eo_schema") or Schema(Settings.load().database_schema)
    config.attributes["eo_schema"] = schema
    return schema


def _configure(schema: Schema, **options: object) -> None:
    context.configure(version_table="alembic_version", version_table_schema=schema.name, **options)


def _run_online(connection: Connection, schema: Schema) -> None:
    # Two deployments that migrate at once would both see the old version; the lock makes the second one find it done.
    connection.execute(text("SELECT pg_advisory_xact_lock(1701801265, hashtext(:name))"), {"name": schema.name})
    # Not IF NOT EXISTS: that wants the right to create schemas even where a DBA has made this one for us.
    if connection.scalar(text("SELECT to_regnamespace(:name)"), {"name": f'"{schema.name}"'}) is None:
        connection.execute(text(f'CREATE SCHEMA "{schema.name}"'))
    _configure(schema, connection=connection)
    context.run_migrations()


def _run_offline(schema: Schema) -> None:
    _configure(schema, dialect_name="postgresql", as_sql=True, literal_binds=True, output_buffer=config.output_buffer)
    with context.begin_transaction():
        context.get_context().impl.static_output(f'CREATE SCHEMA IF NOT EXISTS "{schema.name}";')
        context.run_migrations()


def main() -> None:
    schema = _schema()
    if context.is_offline_mode():
        _run_offline(schema)
        return
    connection = config.attributes.get("connection")
    if connection is not None:
        _run_online(connection, schema)
        return
    engine = create_engine(Settings.load().require_database_url())
    with engine.begin() as opened:
        _run_online(opened, schema)
    engine.dispose()


main()
