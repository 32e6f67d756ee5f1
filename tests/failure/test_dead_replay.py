"""`eo dead replay` and `discard`: a letter is dead, waits in its lane or is gone, whatever happens to the command."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event

from eoframework import App, Topic, clock, dead, events
from eoframework.db.dead_letter_desk import DeadLetterDesk
from eoframework.db.parking import Parking
from eoframework.db.processed import ProcessedMessages
from eoframework.db.reprocessing import Reprocessing
from eoframework.db.session import Database
from eoframework.errors import ConfigurationError, Conflict, EoError, FailClosed, NotFound, Retryable
from eoframework.settings import Settings
from tests.failure.dead_shop import Order
from tests.failure.graveyard import Graveyard
from tests.processes import eventually

LANES = "SELECT key, held, due_at <= clock_timestamp() FROM eo.parked_key ORDER BY key"
WAITS_FOR_LOCK = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"


@pytest.fixture
def graveyard(database: Database) -> Graveyard:
    return Graveyard(database)


def make_app(
    settings: Settings, database: Database, *, name: str = "deadshop", handler: str = "book", topic: str = "dead.orders"
) -> App:
    app = App(name, engine=database.engine, settings=settings)

    @app.handler(Topic(topic, Order, key="order_id"), name=handler)
    def book(order: Order) -> None:
        """Never called: whoever replays only puts back."""

    return app


@pytest.fixture
def app(settings: Settings, database: Database) -> App:
    return make_app(settings, database)


@pytest.fixture
def seen() -> Iterator[list[tuple[str, dict[str, object]]]]:
    found: list[tuple[str, dict[str, object]]] = []
    unsubscribe = events.subscribe(lambda name, fields: found.append((name, fields)))
    yield found
    unsubscribe()


# --- what it does ---


def test_a_letter_goes_back_into_its_lane(graveyard: Graveyard, app: App) -> None:
    number = graveyard.bury(5, do="x")
    ids = graveyard.rows("SELECT message_id FROM eo.dead_letter")
    done = dead.replay(app, [number], actor="ann@desk")
    assert (done.moved, done.gone, done.refused) == ([number], [], [])
    assert graveyard.rows("SELECT * FROM eo.dead_letter UNION ALL SELECT * FROM eo.dead_letter") == []
    assert graveyard.rows("SELECT * FROM eo.processed_message") == []
    assert graveyard.rows(LANES) == [(b"a", False, True)]
    stored = graveyard.rows(
        'SELECT partition, "offset", topic, message_id, key, value, headers::text, timestamp, attempts, crashes, '
        "error_class FROM eo.parked_message"
    )
    record = graveyard.record(5, do="x")
    assert stored == [
        (0, 5, "dead.orders", ids[0][0], b"a", record.value, '[["trace", "1"]]', record.timestamp, 0, 0, None)
    ]
    assert graveyard.rows("SELECT actor, action, subject, detail ->> 'place' FROM eo.audit") == [
        ("ann@desk", "dead.replay", f"dead_letter/{number}", "dead.orders[0]@5")
    ]


def test_letters_go_back_in_the_order_of_their_places(
    graveyard: Graveyard, app: App, seen: list[tuple[str, dict[str, object]]]
) -> None:
    """Seen to fail with the letters taken by their numbers: 9 was due while 5 was still dead."""
    late, early, elsewhere = graveyard.bury(9), graveyard.bury(5), graveyard.bury(1, partition=1, key=b"b")
    done = dead.replay(app, [late, elsewhere, early])
    assert done.moved == [early, late, elsewhere]
    order = [(name, fields["id"]) for name, fields in seen if name.startswith("replay.")]
    assert order == [(f"replay.{step}", number) for number in done.moved for step in ("moving", "moved")]
    assert graveyard.parked() == [5, 9, 1]


def test_it_stands_before_what_waits_and_is_due_at_once(graveyard: Graveyard, app: App) -> None:
    graveyard.park(8, wait=3600)
    graveyard.park(9)
    dead.replay(app, [graveyard.bury(5)])
    assert graveyard.parked() == [5, 8, 9]
    assert graveyard.rows(LANES) == [(b"a", False, True)]


def test_a_held_key_is_released_by_the_letter_that_holds_it_alone(graveyard: Graveyard, app: App) -> None:
    """Seen to fail without the question for others that hold: replaying 3 released the key before 5 was decided."""
    other, holder = graveyard.bury(3), graveyard.bury(5, holds=True)
    graveyard.park(6)
    dead.replay(app, [other])
    assert graveyard.rows("SELECT held FROM eo.parked_key") == [(True,)]
    dead.replay(app, [holder])
    assert graveyard.rows(LANES) == [(b"a", False, True)]
    assert graveyard.parked() == [3, 5, 6]


def test_all_takes_what_there_was_and_leaves_what_it_cannot(graveyard: Graveyard, app: App, database: Database) -> None:
    good = [graveyard.bury(offset, key=b"k%d" % offset) for offset in range(120)]
    bad = graveyard.bury(500, value=b"no json")
    foreign = Graveyard(database, "othershop.book").bury(1)
    later: list[int] = []
    unsubscribe = events.subscribe(
        lambda name, _: later.append(graveyard.bury(900, key=b"z")) if name == "replay.moved" and not later else None
    )
    done = dead.replay_all(app)
    unsubscribe()
    assert done.moved == good
    assert [refusal.letter.id for refusal in done.refused] == [bad]
    assert graveyard.rows("SELECT id FROM eo.dead_letter ORDER BY id") == [(bad,), (foreign,), (later[0],)]
    again = dead.replay_all(app, dead.DeadFilter(key=b"z"))
    assert again.moved == later


def test_a_dry_run_changes_nothing(graveyard: Graveyard, app: App) -> None:
    numbers = [graveyard.bury(5), graveyard.bury(6)]
    before = graveyard.everything()
    assert dead.replay_all(app, dry_run=True).moved == numbers
    assert dead.replay(app, numbers, dry_run=True).moved == numbers
    assert graveyard.everything() == before


def test_a_rate_is_a_pause_that_can_be_ended(graveyard: Graveyard, app: App) -> None:
    """Seen to hang with clock.sleep for clock.wait: nobody could end a slow replay."""
    numbers = [graveyard.bury(5), graveyard.bury(6)]
    stop = threading.Event()
    unsubscribe = events.subscribe(lambda name, _: stop.set() if name == "replay.moved" else None)
    first = dead.replay(app, numbers, rate=0.001, stop=stop)
    assert (first.moved, first.stopped) == (numbers[:1], True)
    unsubscribe()
    rest = dead.replay(app, numbers[1:], rate=1000)
    assert (rest.moved, rest.stopped) == (numbers[1:], False)


# --- at once, and twice ---


def test_issued_twice_at_once_moves_each_letter_once(graveyard: Graveyard, app: App) -> None:
    """Seen to fail with `_take`'s answer ignored: the second one failed on the parked row, or parked it again."""
    numbers = [graveyard.bury(offset, key=key) for offset, key in ((5, b"a"), (6, b"a"), (7, None), (8, b"b"))]
    both = threading.Barrier(2)
    results: list[dead.Replayed] = []

    def replay() -> None:
        both.wait()
        results.append(dead.replay_all(app))

    threads = [threading.Thread(target=replay) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results[0].moved + results[1].moved) == sorted(numbers)
    assert sorted(graveyard.parked()) == [5, 6, 7, 8]
    assert graveyard.rows("SELECT count(*) FROM eo.audit") == [(4,)]


def test_the_second_waits_for_the_first_and_finds_it_gone(graveyard: Graveyard, app: App) -> None:
    number = graveyard.bury(5)
    moving, go = threading.Event(), threading.Event()

    def pause(name: str, _fields: dict[str, object]) -> None:
        if name == "replay.moving" and not moving.is_set():
            moving.set()
            assert go.wait(20)

    unsubscribe = events.subscribe(pause)
    results: list[dead.Replayed] = []
    first = threading.Thread(target=lambda: results.append(dead.replay(app, [number])))
    first.start()
    assert moving.wait(20)
    second = threading.Thread(target=lambda: results.append(dead.replay(app, [number])))
    second.start()
    eventually(lambda: graveyard.rows(WAITS_FOR_LOCK) == [(1,)], "the second one waits for the lane")
    go.set()
    first.join(20)
    second.join(20)
    unsubscribe()
    assert sorted((result.moved, result.gone) for result in results) == [([], [number]), ([number], [])]
    assert graveyard.parked() == [5]


def test_no_deadlock_with_a_batch_that_meets_the_same_message(graveyard: Graveyard, app: App) -> None:
    """A batch reads the lane and then claims ids; seen to fail (deadlock) with the lane locked last in `put_back`."""
    graveyard.park(8, wait=3600)
    number = graveyard.bury(5)
    identity = uuid.UUID(str(graveyard.rows("SELECT message_id FROM eo.dead_letter")[0][0]))
    results: list[dead.Replayed] = []
    thread = threading.Thread(target=lambda: results.append(dead.replay(app, [number])))
    schema = graveyard.database.schema
    with graveyard.database.begin("batch") as connection:
        lane = (0, graveyard.lane(graveyard.record(5)))
        assert Parking(schema).shut(connection, graveyard.stream, {lane}) == {lane}
        thread.start()
        eventually(lambda: graveyard.rows(WAITS_FOR_LOCK) == [(1,)], "the replay waits for the batch")
        claimed = ProcessedMessages(schema).claim(connection, graveyard.stream.consumer_id, {identity})
        assert claimed == set()
    thread.join(20)
    assert results[0].moved == [number]
    assert graveyard.parked() == [5, 8]


def test_a_command_that_is_stopped_in_the_middle_holds_no_lane(graveyard: Graveyard, app: App) -> None:
    """As by Ctrl-Z. Seen to fail (lock timeout here) without `_BRIEF` in Database.brief: every batch with that key
    would have waited for as long as the command was stopped.
    """
    number = graveyard.bury(5)
    graveyard.park(8, wait=3600)
    stopped, go = threading.Event(), threading.Event()

    def stop(name: str, _fields: dict[str, object]) -> None:
        if name == "replay.moving":
            stopped.set()
            assert go.wait(60)

    unsubscribe = events.subscribe(stop)
    raised: list[BaseException] = []

    def replay() -> None:
        with pytest.raises(Retryable) as failed:
            dead.replay(app, [number])
        raised.append(failed.value)

    thread = threading.Thread(target=replay)
    thread.start()
    try:
        assert stopped.wait(20)
        with graveyard.database.begin("batch") as connection:
            connection.exec_driver_sql("SET LOCAL lock_timeout = '12s'")
            lane = (0, graveyard.lane(graveyard.record(5)))
            assert Parking(graveyard.database.schema).shut(connection, graveyard.stream, {lane}) == {lane}
    finally:
        go.set()
        thread.join(20)
        unsubscribe()
    assert f"replaying dead letter {number}" in str(raised[0])
    assert dead.find(app.database, number).id == number
    assert graveyard.parked() == [8]


def deadlocks(graveyard: Graveyard, number: int, *, times: int) -> None:
    """The server ends whatever changes this letter, so many times."""
    graveyard.execute(
        f"""CREATE SEQUENCE victims; CREATE FUNCTION deadlock() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF nextval('victims') <= {times} THEN
                RAISE EXCEPTION 'deadlock detected' USING ERRCODE = 'deadlock_detected';
            END IF;
            RETURN new;
        END $$;
        CREATE TRIGGER deadlock BEFORE INSERT ON eo.audit FOR EACH ROW
            WHEN (new.subject = 'dead_letter/{number}') EXECUTE FUNCTION deadlock()"""
    )


@pytest.mark.parametrize("discard", [False, True], ids=["replay", "discard"])
def test_a_deadlock_does_not_end_it_half_way(graveyard: Graveyard, app: App, *, discard: bool) -> None:
    """Seen to fail without the loop in `patiently`: the first letter was done, the third never tried."""
    numbers = [graveyard.bury(offset) for offset in (5, 6, 7)]
    deadlocks(graveyard, numbers[1], times=2)
    done = dead.discard_all(app.database) if discard else dead.replay_all(app).moved
    assert done == numbers
    assert graveyard.parked() == ([] if discard else [5, 6, 7])


@pytest.mark.parametrize("discard", [False, True], ids=["replay", "discard"])
def test_deadlocks_without_end_end_it_with_what_was_done(graveyard: Graveyard, app: App, *, discard: bool) -> None:
    numbers = [graveyard.bury(offset) for offset in (5, 6, 7)]
    deadlocks(graveyard, numbers[1], times=1000)
    change = partial(dead.discard, app.database) if discard else partial(dead.replay, app)
    with pytest.raises(Retryable, match=rf"dead letter {numbers[1]}.*deadlock.*1 before it.*Say it again") as ended:
        change(numbers)
    assert isinstance(ended.value.__cause__, Conflict)
    assert [row[0] for row in graveyard.rows("SELECT id FROM eo.dead_letter ORDER BY id")] == numbers[1:]


# --- refusals ---


def outbox_letter(graveyard: Graveyard) -> int:
    graveyard.execute(
        "INSERT INTO eo.dead_letter (origin, message_id, topic, type, source, content_type, created_at, cause) "
        "VALUES ('outbox', gen_random_uuid(), 't', 't', 's', 'c', now(), 'too large')"
    )
    return int(graveyard.rows("SELECT id FROM eo.dead_letter WHERE origin = 'outbox'")[0][0])


def forgotten(graveyard: Graveyard) -> int:
    number = graveyard.bury(5)
    graveyard.execute("DELETE FROM eo.position")
    return number


def earlier_topic(graveyard: Graveyard) -> int:
    number = graveyard.bury(5)
    graveyard.execute(f"UPDATE eo.dead_letter SET topic_id = gen_random_uuid() WHERE id = {number}")
    return number


def processed_since(graveyard: Graveyard) -> int:
    number = graveyard.bury(5)
    graveyard.execute("UPDATE eo.processed_message SET first_at = now() + interval '1 minute'")
    return number


REFUSED: list[tuple[Callable[[Graveyard], int], dict[str, Any], type[EoError], str]] = [
    (lambda _: 4711, {}, NotFound, "dead letter 4711 does not exist"),
    (outbox_letter, {}, NotFound, r"of the outbox.*eo outbox retry"),
    (earlier_topic, {}, FailClosed, r"re-created.*--payload > letter-(\d+).*discard \1 --forget-id.*< letter-\1"),
    (lambda g: g.bury(5), {"handler": "renamed"}, ConfigurationError, r"no handler 'book' any more.*name='book'"),
    (lambda g: g.bury(5), {"name": "othershop"}, ConfigurationError, "not of app 'othershop'"),
    (lambda g: g.bury(5), {"topic": "dead.elsewhere"}, ConfigurationError, "reads dead.elsewhere now"),
    (lambda g: g.bury(5, value=b'{"id": 1}'), {}, ConfigurationError, r"no longer is.*has changed.*order_id"),
    (
        lambda g: g.bury(5, value=b"{}", error_class="eoframework.errors.DecodeError"),
        {},
        ConfigurationError,
        "still cannot be decoded",
    ),
    (lambda g: g.bury(5, unreadable="a header"), {}, ConfigurationError, "a header"),
    (forgotten, {}, FailClosed, r"positions.*forgotten.*eo run"),
    (processed_since, {}, FailClosed, r"was processed after it was given up on"),
]


@pytest.mark.parametrize(("make", "how", "error", "says"), REFUSED)
def test_a_refusal_changes_nothing(
    graveyard: Graveyard,
    settings: Settings,
    database: Database,
    make: Callable[[Graveyard], int],
    how: dict[str, Any],
    error: type[EoError],
    says: str,
) -> None:
    """Also for the letters named with it. Seen to fail with `_check` called letter by letter in `replay`."""
    number = make(graveyard)
    app = make_app(settings, database, **how)
    others = [graveyard.bury(2), graveyard.bury(3, key=b"c")]
    before = graveyard.everything()
    with pytest.raises(error, match=says) as refused:
        dead.replay(app, [*others, number])
    assert "Nothing was changed" in str(refused.value)
    assert graveyard.everything() == before


def test_what_was_done_before_is_told_with_time_and_person(graveyard: Graveyard, app: App, database: Database) -> None:
    replayed, discarded = graveyard.bury(5), graveyard.bury(6)
    dead.replay(app, [replayed], actor="ann@desk")
    dead.discard(database, [discarded], actor="bob@desk")
    before = graveyard.everything()
    for change in (lambda number: dead.replay(app, [number]), lambda number: dead.discard(database, [number])):
        with pytest.raises(NotFound, match=rf"{replayed} is no more: dead.replay by ann@desk at 20"):
            change(replayed)
        with pytest.raises(NotFound, match=rf"{discarded} is no more: dead.discard by bob@desk at 20"):
            change(discarded)
    with pytest.raises(NotFound, match="ann@desk"):
        dead.find(database, replayed)
    assert graveyard.everything() == before


def test_an_id_processed_meanwhile_is_not_forgotten(graveyard: Graveyard, app: App, database: Database) -> None:
    """The check was passed before. Seen to fail without `first_at <= died_at`: its effects would happen again."""
    number = graveyard.bury(5)
    letter = dead.find(database, number)
    graveyard.execute("UPDATE eo.processed_message SET first_at = now() + interval '1 minute'")
    DeadLetterDesk(database).put_back(letter, actor="test")
    assert graveyard.rows("SELECT message_id FROM eo.processed_message") == [(letter.message_id,)]


def duplicate(graveyard: Graveyard, identity: uuid.UUID) -> None:
    """The producer sends the message once more, two hours after it was given up on."""
    for table, column in (("processed_message", "processed_at"), ("processed_message", "first_at")):
        graveyard.execute(f"UPDATE eo.{table} SET {column} = {column} - interval '2 hours'")
    graveyard.execute("UPDATE eo.dead_letter SET died_at = died_at - interval '2 hours'")
    with graveyard.database.begin("test") as connection:
        claimed = ProcessedMessages(graveyard.database.schema).claim(
            connection, graveyard.stream.consumer_id, {identity}
        )
    assert claimed == set()
    assert graveyard.rows("SELECT clock_timestamp() - processed_at < interval '1 hour' FROM eo.processed_message") == [
        (True,)
    ]


def test_a_duplicate_that_was_not_run_keeps_no_letter_from_being_replayed(graveyard: Graveyard, app: App) -> None:
    """It only makes the id be remembered longer. Seen to fail with processed_at in place of first_at in `_LETTERS`:
    refused for ever as processed since.
    """
    identity = uuid.uuid4()
    number = graveyard.bury(5, identity=identity)
    duplicate(graveyard, identity)
    assert dead.replay(app, [number]).moved == [number]
    assert graveyard.rows("SELECT FROM eo.processed_message") == []
    assert graveyard.parked() == [5]


def test_a_duplicate_between_check_and_replay_does_not_lose_the_message(
    graveyard: Graveyard, database: Database
) -> None:
    """Seen to fail with processed_at in place of first_at in `_FORGET`: parked, and then taken for a duplicate."""
    identity = uuid.uuid4()
    letter = dead.find(database, graveyard.bury(5, identity=identity))
    duplicate(graveyard, identity)
    DeadLetterDesk(database).put_back(letter, actor="test")
    assert graveyard.rows("SELECT FROM eo.processed_message") == []


def test_what_dies_again_after_its_id_was_forgotten_can_be_replayed(graveyard: Graveyard, app: App) -> None:
    """Seen to fail with `died_at = excluded.died_at` removed from `_BURY`: its own burial counted as processed since.

    And, the letter read before it died again, with the time of death that was read then in `_FORGET`.
    """
    identity = uuid.uuid4()
    number = graveyard.bury(5, identity=identity)
    graveyard.execute("UPDATE eo.dead_letter SET died_at = died_at - interval '8 days'")
    graveyard.execute("DELETE FROM eo.processed_message")
    early = dead.find(app.database, number)
    assert graveyard.bury(5, identity=identity) == number
    letter = dead.find(app.database, number)
    assert (letter.processed_since, letter.died_at > early.died_at) == (False, True)
    DeadLetterDesk(app.database).put_back(early, actor="test")
    assert graveyard.rows("SELECT FROM eo.processed_message") == []


def test_a_repetition_counts_as_processed_since(graveyard: Graveyard, app: App) -> None:
    """Of another delivery with the same id. Seen to fail without `first_at = now()` in `_REPEAT`: it ran once more."""
    identity = uuid.uuid4()
    number = graveyard.bury(5, identity=identity)
    with graveyard.database.begin("test") as connection:
        again = Reprocessing(graveyard.database)
        assert again.repeat(connection, graveyard.stream.consumer_id, {identity}, before=clock.now()) == {identity}
    with pytest.raises(FailClosed, match="was processed after it was given up on"):
        dead.replay(app, [number])


# --- discard ---


def test_a_discarded_message_stays_processed(graveyard: Graveyard, database: Database) -> None:
    number, kept = graveyard.bury(5), graveyard.bury(6)
    graveyard.park(8, wait=3600)
    before = graveyard.everything()
    assert dead.discard(database, [number], actor="ann@desk") == [number]
    after = graveyard.everything()
    changed = {table for table in before if before[table] != after[table]}
    assert changed == {"dead_letter", "audit"}  # the lane waits for something else
    assert graveyard.rows("SELECT id FROM eo.dead_letter") == [(kept,)]
    action, cause, error = graveyard.rows("SELECT action, detail ->> 'cause', detail ->> 'error' FROM eo.audit")[0]
    assert (action, error) == ("dead.discard", "no such article")
    assert "5 attempts failed" in cause


def test_discarding_releases_the_key_that_was_held(graveyard: Graveyard, database: Database) -> None:
    with_more, alone = graveyard.bury(5, holds=True), graveyard.bury(6, key=b"b", holds=True)
    graveyard.park(8)
    assert graveyard.rows("SELECT held FROM eo.parked_key") == [(True,), (True,)]
    dead.discard(database, [with_more, alone])
    assert graveyard.rows(LANES) == [(b"a", False, True)]
    assert graveyard.parked() == [8]


def test_discard_of_an_unknown_number_changes_nothing(graveyard: Graveyard, database: Database) -> None:
    number = graveyard.bury(5)
    before = graveyard.everything()
    with pytest.raises(NotFound, match="4711 does not exist"):
        dead.discard(database, [number, 4711])
    with pytest.raises(NotFound, match=r"of the outbox.*Nothing was changed.*eo outbox discard \d"):
        dead.discard(database, [number, outbox_letter(graveyard)])
    graveyard.execute("DELETE FROM eo.dead_letter WHERE origin = 'outbox'")
    assert graveyard.everything() == before


def test_discard_all_by_filter(graveyard: Graveyard, database: Database) -> None:
    numbers = [graveyard.bury(offset, fingerprint=f"f{offset % 2}") for offset in range(10)]
    assert dead.discard_all(database, dead.DeadFilter(fingerprint="f1")) == numbers[1::2]
    assert dead.count(database) == 5


def test_what_died_since_the_count_is_left_alone(graveyard: Graveyard, app: App, database: Database) -> None:
    """A person was asked with the number. Seen to fail with `up_to` left out of both."""
    asked = graveyard.bury(5)
    counted = dead.counted(database)
    later = graveyard.bury(6)
    assert (counted.count, counted.up_to) == (1, asked)
    assert dead.replay_all(app, up_to=counted.up_to).moved == [asked]
    again = graveyard.bury(7)
    counted = dead.counted(database)
    last = graveyard.bury(8)
    assert dead.discard_all(database, up_to=counted.up_to) == [later, again]
    assert [letter.id for letter in dead.letters(database).items] == [last]


def test_a_letter_of_the_outbox_is_shown_by_the_outbox(graveyard: Graveyard, database: Database) -> None:
    number = outbox_letter(graveyard)
    with pytest.raises(NotFound, match=rf"of the outbox.*eo outbox show {number}") as refused:
        dead.find(database, number)
    assert "Nothing was changed" not in str(refused.value)


def test_an_id_processed_since_is_kept_though_it_is_to_be_forgotten(graveyard: Graveyard, database: Database) -> None:
    """Seen to fail without `first_at <= died_at` in `_FORGET`: published anew, its effects would happen again."""
    number = processed_since(graveyard)
    dead.discard(database, [number], forget_id=True)
    assert len(graveyard.rows("SELECT FROM eo.processed_message")) == 1
    assert graveyard.rows("SELECT detail ->> 'forgot_id' FROM eo.audit") == [("true",)]


def test_discarding_reads_no_payloads(graveyard: Graveyard, database: Database) -> None:
    """They may be large, and there may be many. Seen to fail with the whole payloads asked for."""
    graveyard.bury(5)
    asked: list[object] = []

    def note(_c: object, _cursor: object, statement: str, values: dict[str, object], *_: object) -> None:
        if "payload" in statement:
            asked.append(values["bytes"])

    event.listen(database.engine, "before_cursor_execute", note)
    dead.discard_all(database)
    assert asked == [0, 0]
    assert dead.count(database) == 0
