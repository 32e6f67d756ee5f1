"""Where this database lives, so that a copy of it is not taken for the database itself.

A copy has all that the original has: the outbox with the same identity and the same pending rows, the same groups and
positions. On the same Kafka cluster the two would send for each other and take each other's partitions. So the tables
remember the server and the database they were made in, and whoever finds them elsewhere is asked what this is.

A server that was copied as a whole (a disk snapshot, a base backup) cannot be told from a standby that was promoted;
there the relay's checkpoints and the marks on the groups' offsets stop whichever of the two comes second.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy import Connection

from eoframework.db.session import Database
from eoframework.errors import FailClosed
from eoframework.schema import Schema

_log = logging.getLogger(__name__)

# Asked first: a query that only names the function is refused when it is planned, whatever branch it would take.
_MAY_ASK: Final = "SELECT has_function_privilege('pg_control_system()', 'EXECUTE')"
# PostgreSQL documentation, "Control Data Functions": the identifier is made by initdb, and physical copies keep it. The
# oid tells the databases of one server apart, and stays when one is renamed.
_HERE: Final = """
SELECT c.system_identifier || '/' || d.oid FROM pg_control_system() c, pg_database d
WHERE d.datname = current_database()
"""
_STORED: Final = "SELECT id, home, copied_from FROM {eo}.outbox"


@dataclass(frozen=True, slots=True)
class Home:
    """What the tables remember, and what is so."""

    outbox_id: UUID
    stored: str | None
    """The server and database they were made in; None where that could not be asked."""
    here: str | None
    copied_from: UUID | None
    """The outbox of the database this one was declared a copy of."""

    @property
    def moved(self) -> bool:
        """Whether they are elsewhere than they were; what is not known proves nothing."""
        return self.stored is not None and self.here is not None and self.stored != self.here


def read(connection: Connection, schema: Schema) -> Home:
    """Where the tables were made and where they are."""
    may_ask = connection.exec_driver_sql(_MAY_ASK).scalar_one()
    here = connection.exec_driver_sql(_HERE).scalar_one() if may_ask else None
    outbox_id, stored, copied_from = connection.exec_driver_sql(schema.sql(_STORED)).one()
    return Home(outbox_id, stored, here, copied_from)


def is_copy(connection: Connection, schema: Schema) -> bool:
    """Whether this database was declared a copy of one that lives on (`eo db adopt copy`)."""
    return connection.exec_driver_sql(schema.sql(_STORED)).one()[2] is not None


def check(database: Database) -> None:
    """Raise FailClosed if the tables were copied here from another database and nobody has said what for."""
    with database.begin("asking where this database lives") as connection:
        home = read(connection, database.schema)
    if home.here is None:
        _log.warning(
            "may not ask which server this is (pg_control_system), so a copy of this database is not recognised; to be "
            "safe: GRANT EXECUTE ON FUNCTION pg_control_system() TO this role."
        )
    if home.moved:
        raise FailClosed(
            f"this database is a copy: its tables were made in database {home.stored} (server/database), and this is "
            f"{home.here}. It was restored from a dump, copied, or moved to another server or a new version of "
            "PostgreSQL. Nothing was processed or sent.",
            remedy="If it takes the place of the one it comes from, which nobody uses any more: eo db adopt "
            "replacement. If that one lives on: eo db adopt copy",
        )
