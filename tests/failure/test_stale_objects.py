"""What the ORM remembers of messages that were taken back must not get into the effects of the others."""

from __future__ import annotations

import json

from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from eoframework import Message, Retry, Topic, Tx, fixed
from eoframework.db.session import Database
from eoframework.settings import Settings
from tests.conftest import MakeTopic
from tests.consume.harness import make_app, rows_reach, running, scalar
from tests.processes import produce


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "account"
    name: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Booking(Base):
    __tablename__ = "booking"
    id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


def test_a_row_read_by_a_failing_message_is_read_again(
    settings: Settings, database: Database, make_topic: MakeTopic
) -> None:
    """The failing message reads what those before it have written, and all of them go back to their savepoint.

    The error's traceback keeps the object it read alive, and SQLAlchemy expires only what was changed in a savepoint:
    seen to fail (the bookings before the failing one counted twice) without `expire_all` in HandlerCalls._saved. Only
    after a batch that failed do others have savepoints, so one comes first.
    """
    topic = Topic(make_topic("bookings", partitions=1), dict[str, int])
    app = make_app(settings, database)

    @app.handler(topic, name="book", retry=Retry(backoff=fixed(0.1)))
    def book(message: Message[dict[str, int]], tx: Tx) -> None:
        amount = message.payload["amount"]
        account = tx.session.get_one(Account, "a", with_for_update=True)
        if amount in (8, 64) and message.attempt == 1:
            raise RuntimeError("not now")
        account.balance += amount
        tx.session.add(Booking(amount=amount))

    Base.metadata.create_all(database.engine)
    with Session(database.engine) as session, session.begin():
        session.add(Account(name="a", balance=0))
    bookings = [(b"a", json.dumps({"amount": 2**n}).encode()) for n in range(6)]
    first = [(b"b", b'{"amount": 64}'), (b"c", b'{"amount": 128}')]
    produce(settings.require_bootstrap_servers(), topic.name, first)
    with running(app):
        rows_reach(database.engine, 2, table="booking")
        produce(settings.require_bootstrap_servers(), topic.name, bookings)
        rows_reach(database.engine, 8, table="booking")
    assert scalar(database.engine, "SELECT balance FROM account") == sum(2**n for n in range(8))
