"""Parked messages that nobody would run any more: not made, not counted, seen, and discarded."""

from __future__ import annotations

import uuid

import pytest

from eoframework import dead
from eoframework.db.external_calls import CallId, ExternalCallRows
from eoframework.db.parking import Parking
from eoframework.db.position_admin import PositionAdmin
from eoframework.db.processed import ProcessedMessages
from eoframework.db.session import Database
from eoframework.errors import FailClosed
from tests.failure.graveyard import Graveyard

GROUP = "deadshop.book"
NEW_TOPIC = uuid.UUID(int=78)


@pytest.fixture
def graveyard(database: Database) -> Graveyard:
    return Graveyard(database)


def recreate(graveyard: Graveyard) -> None:
    """The topic was created anew, and the consumer stands for the new one."""
    graveyard.execute(f"UPDATE eo.position SET topic_id = '{NEW_TOPIC}'")


def count(graveyard: Graveyard) -> int:
    with graveyard.database.begin("test") as connection:
        return Parking(graveyard.database.schema).count(connection, graveyard.stream.consumer_id, limit=10)


def test_what_is_left_of_an_earlier_topic_takes_no_room(graveyard: Graveyard) -> None:
    """Seen to fail with the topics removed from `_COUNT`: max_parked was reached for ever."""
    graveyard.park(1, wait=3600)
    graveyard.park(2)
    assert count(graveyard) == 2
    recreate(graveyard)
    assert count(graveyard) == 0


def test_positions_are_not_forgotten_while_messages_wait(graveyard: Graveyard, database: Database) -> None:
    """Seen to fail without `_refuse` in `forget`: the messages stood in no list as lost, and nobody ran them."""
    graveyard.park(1, wait=3600)
    graveyard.park(2, key=b"b", wait=3600)
    before = graveyard.everything()
    desk = PositionAdmin(database)
    with pytest.raises(FailClosed, match=rf"2 parked messages.*eo dead discard --parked --handler {GROUP}") as refused:
        desk.forget(GROUP)
    assert refused.value.exit_code == 70
    with pytest.raises(FailClosed, match="2 parked messages"):
        desk.refuse_parked(GROUP)
    assert graveyard.everything() == before
    dead.discard_parked(database, dead.DeadFilter(handler=GROUP))
    assert desk.forget(GROUP) == 3


def test_what_is_stranded_is_seen_and_hinders_nobody(graveyard: Graveyard, database: Database) -> None:
    """Seen to fail without `has_position`: shown as due, for ever."""
    graveyard.park(1, wait=0)
    assert [lane.state for lane in dead.lanes(database).items] == ["due"]
    recreate(graveyard)
    assert [lane.state for lane in dead.lanes(database).items] == ["stranded"]
    assert PositionAdmin(database).forget(GROUP) == 3
    assert [(lane.state, lane.messages) for lane in dead.lanes(database).items] == [("stranded", 1)]
    assert dead.discard_parked(database, dead.DeadFilter(handler=GROUP)) == 1
    assert dead.lanes(database).items == ()


def test_discarded_messages_count_as_processed(graveyard: Graveyard, database: Database) -> None:
    """Lane by lane, with one audit row each. Seen to fail without `claim`: a duplicate of one would have been run.

    And without `_OPEN`: the lane stayed shut with nothing in it.
    """
    identity = uuid.uuid4()
    graveyard.park(1, wait=3600)
    graveyard.park(2)
    graveyard.execute(f"UPDATE eo.parked_message SET message_id = '{identity}' WHERE \"offset\" = 2")
    graveyard.park(3, key=b"b", wait=3600)
    graveyard.park(4, key=None, wait=3600)
    assert dead.count_parked(database, dead.DeadFilter(key=b"a")) == 2
    assert dead.discard_parked(database, dead.DeadFilter(key=b"a"), actor="ann@desk") == 2
    assert graveyard.rows('SELECT "offset" FROM eo.parked_message ORDER BY 1') == [(3,), (4,)]
    assert len(graveyard.rows("SELECT FROM eo.parked_key")) == 2
    with graveyard.database.begin("test") as connection:
        processed = ProcessedMessages(database.schema)
        assert processed.claim(connection, graveyard.stream.consumer_id, {identity}) == set()
    assert graveyard.rows(
        "SELECT actor, action, subject, detail ->> 'offsets', detail -> 'message_ids' ->> 1 FROM eo.audit"
    ) == [("ann@desk", "parked.discard", f"consumer/{GROUP}", "[1, 2]", str(identity))]
    assert dead.discard_parked(database, dead.DeadFilter(), actor="ann@desk") == 2
    assert graveyard.rows("SELECT FROM eo.parked_key") == []
    assert graveyard.rows("SELECT count(*) FROM eo.audit") == [(3,)]


def test_a_lane_that_a_dead_letter_holds_stays_held(graveyard: Graveyard, database: Database) -> None:
    """Seen to fail with the letters left out of `_OPEN`: the key went on before somebody had decided."""
    number = graveyard.bury(1, holds=True)
    graveyard.park(2)
    assert dead.discard_parked(database) == 1
    assert [(lane.state, lane.held_by) for lane in dead.lanes(database).items] == [("held", number)]
    assert dead.discard_parked(database) == 0
    assert graveyard.rows("SELECT count(*) FROM eo.audit") == [(1,)]
    dead.discard(database, [number])
    assert dead.lanes(database).items == ()


def test_results_of_their_calls_may_be_forgotten(graveyard: Graveyard, database: Database) -> None:
    """Seen to fail without `settle`: the row stayed for ever."""
    graveyard.park(1, key=None, wait=3600)
    identity = graveyard.lane(graveyard.record(1, key=None))  # a lone message without an id goes by its place
    call = CallId(graveyard.stream.consumer_id, identity, "pay")
    with database.begin("test") as connection:
        rows = ExternalCallRows(database.schema)
        rows.claim(connection, call, place=(0, 1), owner="me", lease=60, again=False)
    dead.discard_parked(database)
    assert graveyard.rows("SELECT settled_at IS NOT NULL FROM eo.external_call") == [(True,)]
