"""tx.publish in a handler: with its savepoints, and with ids that a re-run repeats."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from eoframework import App, EncodeError, HandlerMisuse, Message, Tx
from eoframework.message import Source, derived_id
from tests.publish.conftest import Published, event, events

TOPIC_ID = uuid4()


def message(offset: int) -> Message[object]:
    return Message(payload=None, id=None, key=None, headers=(), topic="in", partition=2, offset=offset, timestamp=None)


def source(offset: int) -> Source:
    return Source("shop.handle", TOPIC_ID, 2, offset, 1_700_000_000_000)


def ids(tx: Tx) -> list[UUID]:
    return [message.id for message in tx.take_outbox()]


@pytest.fixture
def tx() -> Tx:
    return Tx(Session(), app_name="shop", consumer="shop.handle")


def test_ids_are_the_same_in_every_run(tx: Tx) -> None:
    """Fails with a new id for each: effects redone after a restore would count twice downstream."""
    runs = []
    for _ in range(2):
        for offset in (7, 8):
            tx.enter(message(offset), source(offset))
            tx.publish(events, event(1))
            tx.publish(events, event(2))
        runs.append(ids(tx))
    assert runs[0] == runs[1] == [derived_id(source(offset), index) for offset in (7, 8) for index in (0, 1)]
    assert len(set(runs[0])) == 4


def test_a_batch_names_the_cause_to_get_the_same_ids_as_one_by_one(tx: Tx) -> None:
    batch = [message(7), message(8)]
    tx.enter_batch([source(7), source(8)])
    for one in reversed(batch):
        tx.publish(events, event(1), cause=one)
        tx.publish(events, event(2), cause=one)
    tx.publish(events, event(3))
    *derived, free = tx.take_outbox()
    assert [m.id for m in derived] == [derived_id(source(offset), index) for offset in (8, 7) for index in (0, 1)]
    assert free.id.version == 7
    with pytest.raises(HandlerMisuse, match=r"cause=in\[2\]@9 is not a message of this unit of work"):
        tx.publish(events, event(1), cause=message(9))


def test_the_message_of_a_batch_is_not_one(tx: Tx) -> None:
    one = message(7)
    tx.enter(one, source(7))
    assert tx.message is one
    tx.enter_batch([source(7)])
    with pytest.raises(HandlerMisuse, match="batch handler"):
        _ = tx.message


def test_an_encode_error_publishes_nothing(tx: Tx) -> None:
    tx.enter(message(7), source(7))
    with pytest.raises(EncodeError):
        tx.publish(events, event(1), headers={"ce_id": "x"})
    assert tx.take_outbox() == []


def test_a_savepoint_rolled_back_takes_its_messages_along(engine: Engine) -> None:
    """Fails when `SessionBuffer.add` does not listen: 2, 4 and 5 would be published without their effects."""
    with Session(engine) as session, session.begin():
        tx = Tx(session, app_name="shop", consumer="shop.handle")
        tx.enter(message(7), source(7))
        tx.publish(events, event(1))
        savepoint = session.begin_nested()
        tx.publish(events, event(2))
        savepoint.rollback()
        with session.begin_nested():
            tx.publish(events, event(3))
        savepoint = session.begin_nested()
        with session.begin_nested():
            tx.publish(events, event(4))
        tx.publish(events, event(5))
        savepoint.rollback()
        tx.publish(events, event(6))
    assert [m.payload for m in tx.take_outbox()] == [b'{"n":%d,"k":"a"}' % n for n in (1, 3, 6)]


def test_app_publish_with_the_handler_s_session_takes_part_in_the_handler(
    app: App, engine: Engine, published: Published
) -> None:
    """Code that is called by a web handler and by a message handler alike. Fails without `tx_of` in App.publish: the
    message would get another id in every run.
    """
    with Session(engine) as session, session.begin():
        tx = Tx(session, app_name="shop", consumer="shop.handle")
        tx.enter(message(7), source(7))
        app.publish(session, events, event(1))
        (out,) = tx.take_outbox()
    assert (out.id, out.source) == (derived_id(source(7), 0), "shop")
    assert published() == []
