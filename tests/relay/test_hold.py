"""A row that Kafka refuses for good, and the later rows of its key: they go on, or wait for a person."""

from __future__ import annotations

import pytest

from eoframework.db.pending import MALFORMED, PendingRows, Refusal
from eoframework.db.shards import Shards
from eoframework.errors import NotFound
from eoframework.failures import MAX_ERROR
from eoframework.kafka.admin import Admin
from eoframework.message import OutboxMessage
from eoframework.outbox_desk import CauseHolds, OutboxDesk, OutboxFilter, OutboxLine
from tests.conftest import MakeTopic
from tests.processes import eventually
from tests.relay.rig import SHARDS, Rig

LIMIT = 4_000


@pytest.fixture
def narrow(make_topic: MakeTopic) -> str:
    """A topic that takes small messages only."""
    return make_topic("narrow", config={"max.message.bytes": str(LIMIT)})


def desk(rig: Rig) -> OutboxDesk:
    return OutboxDesk(rig.database, rig.settings, actor="tester")


def widen(rig: Rig, topic: str) -> None:
    """Let the topic take large messages; the broker says so a moment after it was told."""
    admin, limit = Admin(rig.settings), {"max.message.bytes": "1000000"}
    admin.set_config(topic, limit)
    eventually(lambda: admin.describe(topic).config.items() >= limit.items(), "the topic takes large messages")


def drain(rig: Rig, **changes: object) -> None:
    with rig.run_here(once=True, **changes) as relay:
        assert relay.ended() == 0


def one_large(rig: Rig, topic: str, *, key: str | None = "k") -> list[OutboxMessage]:
    """Small, large, small, small, of one key, in one transaction."""
    made = [rig.message(key=key, topic=topic, size=size) for size in (0, 20_000, 0, 0)]
    with rig.database.begin("test") as connection:
        rig.insert(connection, made)
    return made


def dead(rig: Rig) -> list[OutboxLine]:
    return list(desk(rig).lines().items)


def test_hold_keeps_the_key_waiting_and_retry_its_order(
    rig: Rig, narrow: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail: without `_NOT_HELD` in the select of db/pending.py (the later rows are sent before); with

    `any_left` not leaving held rows out (`--once` never ends); with a new number in `put_back` of db/outbox_desk.py
    (the letter is sent behind the rows that waited for it).
    """
    first, large, *later = one_large(rig, narrow)
    others = rig.publish(30, topic=narrow, keys=7)
    drain(rig, relay_after_dead="hold")
    rig.assert_published([first, *others], narrow)
    assert rig.left() == len(later)
    assert "rows of 1 keys stay in the outbox" in caplog.text
    (letter,) = dead(rig)
    assert (letter.message_id, letter.held_by, letter.error_class) == (large.id, letter.number, "MSG_SIZE_TOO_LARGE")
    widen(rig, narrow)
    done = desk(rig).retry(letter.number)
    assert (done.opened, done.waits_for) == (True, None)
    drain(rig, relay_after_dead="hold")
    rig.assert_published([first, large, *later, *others], narrow)
    assert (dead(rig), rig.left()) == ([], 0)
    assert rig.sql("SELECT * FROM eo.outbox_held") == []


def test_continue_lets_the_key_go_on(rig: Rig, narrow: str) -> None:
    first, large, *later = one_large(rig, narrow)
    drain(rig)
    rig.assert_published([first, *later], narrow)
    widen(rig, narrow)
    done = desk(rig).retry(large.id)
    assert not done.opened
    drain(rig)
    rig.assert_published([first, *later, large], narrow)


def test_a_row_without_a_key_holds_nothing(rig: Rig, narrow: str) -> None:
    first, large, *later = one_large(rig, narrow, key=None)
    drain(rig, relay_after_dead="hold")
    rig.assert_published([first, *later], narrow)
    assert [(line.message_id, line.held_by) for line in dead(rig)] == [(large.id, None)]


def test_discard_lets_the_key_go_on_without_it(rig: Rig, narrow: str) -> None:
    """Seen to fail (the delete is refused by the foreign key) without the opening in `_take` of db/outbox_desk.py."""
    first, large, *later = one_large(rig, narrow)
    drain(rig, relay_after_dead="hold")
    assert desk(rig).discard(large.id).message_id == large.id
    drain(rig, relay_after_dead="hold")
    rig.assert_published([first, *later], narrow)
    with pytest.raises(NotFound, match=r"outbox\.discard by tester at .* Nothing was changed"):
        desk(rig).discard(large.id)


def test_what_is_published_while_the_key_is_held_waits_too(rig: Rig, narrow: str) -> None:
    first, large, *later = one_large(rig, narrow)
    with rig.run_here(relay_after_dead="hold"):
        rig.wait_for(lambda: len(dead(rig)) == 1, what="the refusal")
        flowing = rig.publish(20, topic=narrow, keys=5)
        rig.wait_for(lambda: rig.left() == len(later), what="the other keys")
        with rig.database.begin("test") as connection:
            later.append(rig.message(key="k", topic=narrow))
            rig.insert(connection, later[-1:])
        flowing += rig.publish(20, topic=narrow, keys=5)
        rig.wait_for(lambda: rig.left() == len(later), what="the other keys again")
        widen(rig, narrow)
        desk(rig).retry(large.id)
        rig.wait_empty()
    rig.assert_published([first, large, *later, *flowing], narrow)


def test_refused_again_it_holds_again_at_the_same_place(rig: Rig, narrow: str) -> None:
    first, large, *later = one_large(rig, narrow)
    drain(rig, relay_after_dead="hold")
    (letter,) = dead(rig)
    with pytest.raises(CauseHolds, match=rf"has 20001 bytes; the topic takes at most {LIMIT}. Nothing was changed"):
        desk(rig).retry(letter.number)
    assert dead(rig) == [letter]
    desk(rig).retry(letter.number, force=True)
    drain(rig, relay_after_dead="hold")
    (again,) = dead(rig)
    assert again.number != letter.number
    assert again.held_by == again.number
    assert rig.left() == len(later)
    widen(rig, narrow)
    desk(rig).retry(again.number)
    drain(rig, relay_after_dead="hold")
    rig.assert_published([first, large, *later], narrow)


def test_a_key_too_large_for_an_index_is_held_too(rig: Rig, make_topic: MakeTopic) -> None:
    topic = make_topic("wide.keys", config={"max.message.bytes": "10000"})
    key = "".join(chr(0x4E00 + number * 7 % 20_000) for number in range(1_500))
    first, large, *later = one_large(rig, topic, key=key)
    drain(rig, relay_after_dead="hold")
    assert [line.held_by for line in dead(rig)] == [line.number for line in dead(rig)] != []
    widen(rig, topic)
    desk(rig).retry(large.id)
    drain(rig, relay_after_dead="hold")
    rig.assert_published([first, large, *later], topic)


def test_two_letters_of_one_key_go_back_in_their_order(rig: Rig, narrow: str) -> None:
    """Died under `continue`, then under `hold`: the older one waits with its key, and is sent first.

    Seen to fail with a new number in `put_back`.
    """
    first, older, *later = one_large(rig, narrow)
    drain(rig)
    second, younger, *last = one_large(rig, narrow)
    drain(rig, relay_after_dead="hold")
    widen(rig, narrow)
    done = desk(rig).retry(older.id)
    assert done.waits_for == dead(rig)[0].number
    drain(rig)
    assert rig.left() == 1 + len(last), "it waits: its key is held for the younger one"
    desk(rig).retry(younger.id)
    drain(rig)
    rig.assert_published([first, *later, second, older, younger, *last], narrow)


MALFORMED_HEADERS = [
    '{"a": 1}',
    "[1]",
    '[["n", 5]]',
    '[["n"]]',
    '[[1, "x"]]',
    r'[["n", "\ud800"]]',
    r'[["\ud800", "x"]]',
    r'[["a\u0000b", "x"]]',
    '[["n", {"base64": "x"}]]',
    '"x"',
    "[" * 3_000 + "]" * 3_000,
]


def test_headers_that_are_none_are_refused_alone(rig: Rig) -> None:
    """Rows written by hand. Seen to fail (the relay ends, again and again) with the headers decoded by the driver, and

    (SIGSEGV in the client) without the check of names in `_with_headers` of db/pending.py.
    """
    flowing = []
    for headers in MALFORMED_HEADERS:
        flowing += rig.publish(3, keys=2)
        (bad,) = rig.publish(1, keys=1)
        sql = "UPDATE eo.outbox_message SET headers = CAST(:headers AS json) WHERE id = :id"
        rig.sql(sql, headers=headers, id=bad.id)
    drain(rig)
    rig.assert_published(flowing)
    letters = dead(rig)
    assert sorted(str(desk(rig).find(letter.number).headers) for letter in letters) == sorted(MALFORMED_HEADERS)
    assert {letter.error_class for letter in letters} == {MALFORMED}
    with pytest.raises(CauseHolds, match="malformed"):
        desk(rig).retry(letters[0].number)


def test_around_the_limit_each_row_is_sent_or_dead(rig: Rig, narrow: str) -> None:
    messages = [rig.message(key="k", topic=narrow, size=size) for size in range(LIMIT - 500, LIMIT + 20, 20)]
    with rig.database.begin("test") as connection:
        rig.insert(connection, messages)
    drain(rig)
    gone = {line.message_id for line in dead(rig)}
    assert 0 < len(gone) < len(messages)
    rig.assert_published([message for message in messages if message.id not in gone], narrow)


def test_a_cause_of_any_kind_can_be_stored(rig: Rig) -> None:
    """Seen to fail (the burial raises, so the row would be tried for ever) without `clean` in db/pending.py."""
    rig.publish(1)
    shards = Shards(rig.database, rig.settings)
    rows = PendingRows(shards)
    for claim in shards.acquire("tester", limit=SHARDS, among=range(SHARDS)):
        for row in rows.select(claim, limit=1, max_bytes=1_000, paused=()).rows:
            refusal = Refusal("nul \0, half a character \ud800, " + "long " * 10_000, "KIND\0" * 100)
            rows.bury(claim, row, refusal, hold=True)
    (letter,) = dead(rig)
    assert letter.cause is not None
    assert letter.cause.startswith("nul \\0, half a character \\ud800")
    assert len(letter.cause) <= MAX_ERROR + 20
    assert desk(rig).lines("dead", OutboxFilter(error="HALF A character")).items == (letter,)
