"""What is dead and what waits: pages, filters, groups, lanes."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest

from eoframework import clock, dead
from eoframework.cli.dead import _show_key
from eoframework.db.dead_letter_desk import _OTHER_HOLDS
from eoframework.db.lane_desk import _LANES, LaneDesk
from eoframework.db.session import Database
from eoframework.errors import NotFound
from eoframework.legible import beginning, legible, parse_bytes
from tests.failure.graveyard import Graveyard


@pytest.fixture
def graveyard(database: Database) -> Graveyard:
    return Graveyard(database)


def ids(page: dead.Page[dead.DeadLetter]) -> list[int]:
    return [letter.id for letter in page.items]


def test_pages_stay_as_they_are_while_letters_are_added_and_taken(graveyard: Graveyard, database: Database) -> None:
    """Seen to fail with OFFSET in place of the number: the letter behind the one discarded was never shown."""
    numbers = [graveyard.bury(offset) for offset in range(7)]
    first = dead.letters(database, limit=3)
    assert ids(first) == numbers[:3]
    added = graveyard.bury(100)
    dead.discard(database, [numbers[1]])
    second = dead.letters(database, limit=3, after=int(first.after or 0))
    third = dead.letters(database, limit=3, after=int(second.after or 0))
    assert ids(second) + ids(third) == [*numbers[3:], added]
    assert third.after is None


def test_every_filter_narrows(graveyard: Graveyard, database: Database) -> None:
    plain = graveyard.bury(1)
    keyed = graveyard.bury(2, key=b"\xff\x00")
    error = graveyard.bury(3, error_class="shop.errors.NoStock")
    printed = graveyard.bury(4, fingerprint="beef")
    elsewhere = Graveyard(database, "othershop.book", topic="dead.refunds").bury(1)
    old = graveyard.bury(5)
    graveyard.execute(f"UPDATE eo.dead_letter SET died_at = now() - interval '3 hours' WHERE id = {old}")
    everything = [plain, keyed, error, printed, elsewhere, old]
    recent = clock.now() - timedelta(hours=2)
    for which, expected in (
        (dead.DeadFilter(), everything),
        (dead.DeadFilter(handler="othershop.book"), [elsewhere]),
        (dead.DeadFilter(topic="dead.refunds"), [elsewhere]),
        (dead.DeadFilter(app="deadshop"), [plain, keyed, error, printed, old]),
        (dead.DeadFilter(key=b"\xff\x00"), [keyed]),
        (dead.DeadFilter(error="NoStock"), [error]),
        (dead.DeadFilter(error="shop.errors.NoStock"), [error]),
        (dead.DeadFilter(error="Stock"), []),
        (dead.DeadFilter(fingerprint="beef"), [printed]),
        (dead.DeadFilter(until=recent), [old]),
        (dead.DeadFilter(since=recent, handler="deadshop.book", key=b"a"), [plain, error, printed]),
    ):
        assert ids(dead.letters(database, which)) == expected, which
        assert dead.count(database, which) == len(expected)
    with pytest.raises(NotFound, match=r"no consumer 'deadshop.buk'.*Did you mean 'deadshop.book'"):
        dead.letters(database, dead.DeadFilter(handler="deadshop.buk"))


def test_a_list_holds_beginnings_and_one_letter_all_of_it(graveyard: Graveyard, database: Database) -> None:
    number = graveyard.bury(1, value=b"x" * 100_000)
    listed = dead.letters(database).items[0]
    assert (len(listed.record.value or b""), listed.size) == (200, 100_000)
    whole = dead.find(database, number)
    assert whole.record.value == b"x" * 100_000
    assert whole.record.headers == (("trace", b"1"),)
    tombstone = dead.find(database, graveyard.bury(2, value=None, key=None))
    assert (tombstone.record.value, tombstone.record.key, tombstone.size) == (None, None, 0)


def test_groups_count_what_died_of_one_thing(graveyard: Graveyard, database: Database) -> None:
    first = [graveyard.bury(offset, fingerprint="aaa") for offset in range(3)]
    second = [graveyard.bury(10 + offset, fingerprint="bbb") for offset in range(2)]
    page = dead.groups(database, limit=1)
    assert [(g.fingerprint, g.count, g.first_id, g.consumer) for g in page.items] == [
        ("aaa", 3, first[0], "deadshop.book")
    ]
    graveyard.bury(20, fingerprint="aaa")
    rest = dead.groups(database, limit=5, after=int(page.after or 0))
    assert [(g.fingerprint, g.count, g.first_id) for g in rest.items] == [("bbb", 2, second[0])]
    assert rest.items[0].first <= rest.items[0].last
    assert rest.after is None


def test_lanes_and_what_waits_in_them(graveyard: Graveyard, database: Database) -> None:
    graveyard.park(5, key=b"waiting", wait=3600)
    graveyard.park(6, key=b"waiting")
    graveyard.park(7, key=b"due", wait=0)
    graveyard.park(8, key=None, wait=3600, partition=1)
    holder = graveyard.bury(9, key=b"held", holds=True)
    seen: list[dead.ParkedLane] = []
    after: str | None = None
    for _ in range(4):
        page = dead.lanes(database, limit=1, after=after)
        seen += page.items
        after = page.after
    assert after is None
    by_key = {lane.key: (lane.state, lane.messages, lane.offset, lane.error_class) for lane in seen}
    assert by_key == {
        b"waiting": ("waiting", 2, 5, "builtins.KeyError"),
        b"due": ("due", 1, 7, "builtins.KeyError"),
        None: ("waiting", 1, 8, "builtins.KeyError"),
        b"held": ("held", 0, None, None),
    }
    assert [(lane.key, lane.topic) for lane in seen if lane.held_by == holder] == [(b"held", "dead.orders")]
    lane = next(lane for lane in seen if lane.key == b"waiting")
    first = dead.waiting(database, lane, limit=1)
    assert [(m.record.offset, m.attempts) for m in first.items] == [(5, 1)]
    rest = dead.waiting(database, lane, after=int(first.after or 0))
    assert [(m.record.offset, m.attempts) for m in rest.items] == [(6, 0)]
    assert len(dead.lanes(database, dead.DeadFilter(error="KeyError")).items) == 3
    assert [lane.key for lane in dead.lanes(database, dead.DeadFilter(key=b"due")).items] == [b"due"]
    with pytest.raises(NotFound, match="no place in the list"):
        dead.lanes(database, after="12")


@pytest.mark.parametrize(
    "data", [b"", b"plain", "ümlaut\n".encode(), b"\xff\x00", b"nul\0", b"base64:AA==", b"\x1b[31m", None]
)
def test_bytes_are_legible_and_can_be_given_back(data: bytes | None) -> None:
    text = legible(data)
    assert (parse_bytes(text) if text is not None else None) == data
    assert text is None or "\x1b" not in text


def test_a_cut_leaves_no_half_character() -> None:
    assert beginning("üü".encode(), 3) == "ü"
    assert beginning(b"\xff\xff\xff", 2) == "base64://8="
    with pytest.raises(NotFound, match="no base64"):
        parse_bytes("base64:!")


def test_whether_another_letter_holds_a_lane_is_asked_of_an_index(graveyard: Graveyard, database: Database) -> None:
    """Seen to fail without the index dead_letter_holds: each answer read all 20,000 letters of the partition."""
    graveyard.bury(0)
    graveyard.execute(
        """INSERT INTO eo.dead_letter (origin, consumer_id, topic_id, partition, "offset", lane, message_id, topic,
                created_at, cause, timestamp, holds)
            SELECT 'handler', consumer_id, topic_id, 0, n, gen_random_uuid(), gen_random_uuid(), topic, now(), '', 0,
                n % 2 = 0
            FROM eo.dead_letter, generate_series(1, 20000) n"""
    )
    graveyard.execute("ANALYZE eo.dead_letter")
    letter = dead.find(database, dead.letters(database).items[0].id)
    lane = {**letter.stream().key(), "partition": 0, "lane": letter.lane}
    with database.engine.connect() as connection:
        found = connection.exec_driver_sql(database.schema.sql(f"EXPLAIN {_OTHER_HOLDS}"), lane).scalars().all()
    assert "dead_letter_holds" in "".join(found)
    graveyard.execute(
        """INSERT INTO eo.parked_key (consumer_id, topic_id, partition, lane, due_at, held)
            SELECT consumer_id, topic_id, partition, lane, now(), true FROM eo.dead_letter WHERE holds LIMIT 2000"""
    )
    graveyard.execute("ANALYZE eo.parked_key")
    sql = _LANES.replace("{conditions}", "true")
    with database.engine.connect() as connection:
        found = connection.exec_driver_sql(database.schema.sql(f"EXPLAIN {sql}"), {"limit": 50}).scalars().all()
    assert "dead_letter_holds" in "".join(found)


def test_what_was_parked_since_the_count_is_left_alone(graveyard: Graveyard, database: Database) -> None:
    """Seen to fail without `parked_at <= %(up_to)s` in `_DELETE`: 6 was gone, which nobody had been asked about."""
    graveyard.park(5, wait=3600)
    counted = dead.counted_parked(database)
    graveyard.park(6)
    graveyard.park(7, key=b"new", wait=3600)
    assert counted.count == 1
    assert dead.discard_parked(database, up_to=counted.up_to) == 1
    assert sorted(graveyard.parked()) == [6, 7]
    # What waited behind it goes on at once.
    assert {lane.key: lane.state for lane in dead.lanes(database).items} == {b"a": "due", b"new": "waiting"}
    assert dead.discard_parked(database) == 2
    assert graveyard.rows("SELECT FROM eo.parked_key") == []


def test_a_lane_that_the_filter_no_longer_lets_through_is_left_alone(graveyard: Graveyard, database: Database) -> None:
    """Seen to fail without `_STILL`: it was deleted for an error that it had no more."""
    graveyard.park(5, wait=3600)
    which = dead.DeadFilter(error="KeyError")
    lane = dead.lanes(database, which).items[0]
    up_to = dead.counted_parked(database, which).up_to
    graveyard.execute("UPDATE eo.parked_message SET error_class = 'shop.NoStock'")
    assert LaneDesk(database).discard(lane, which, up_to=up_to, actor="test") == 0
    assert graveyard.parked() == [5]


def test_a_key_with_more_than_a_page_says_where_it_goes_on(
    graveyard: Graveyard, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen to fail without `_more_of_key`: the 51st letter was nowhere, and nothing said so."""
    numbers = [graveyard.bury(offset, key=b"a key") for offset in range(51)]
    which = dead.DeadFilter(key=b"a key", handler="deadshop.book")
    _show_key(database, which, as_json=False)
    more = f"more: eo dead ls '--key=a key' --handler=deadshop.book --after {numbers[49]}"
    assert capsys.readouterr().out.splitlines()[-1] == more
    _show_key(database, which, as_json=True)
    assert json.loads(capsys.readouterr().out)["after"] == {"lanes": None, "dead_letters": str(numbers[49])}
    assert ids(dead.letters(database, which, after=numbers[49])) == numbers[50:]
