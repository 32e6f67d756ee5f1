"""A result of 100 MB, and its reader stopped in the middle of receiving it."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.crash import freeze

_TELL = """
CREATE FUNCTION pg_temp.tell(i int) RETURNS int LANGUAGE plpgsql AS $$
BEGIN IF i = 10 THEN RAISE NOTICE 'ten rows sent'; END IF; RETURN i; END $$
"""
_LARGE = "SELECT /* large result */ repeat('x', 10000), pg_temp.tell(i) FROM generate_series(1, 10000) AS i"


def receive_large_result(session: Session) -> None:
    """The client library calls the notice handler while it reads the result: SIGSTOP arrives with most of it unread."""
    driver = session.connection().connection.dbapi_connection
    assert driver is not None
    driver.add_notice_handler(lambda _: freeze())
    session.execute(text(_TELL))
    session.execute(text(_LARGE)).all()
