"""Dead letters from their death to their second life: a real worker, a real topic."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from sqlalchemy import text

from eoframework import App, Message, Retry, Topic, Tx, dead, ops
from eoframework.db.session import Database
from eoframework.errors import FailClosed
from eoframework.kafka.admin import Admin
from eoframework.retry import AfterDead
from eoframework.settings import Settings
from tests.conftest import MakeTopic
from tests.consume.harness import column, make_app, make_ledger, rows_reach, running, scalar
from tests.processes import eventually, produce

DEAD = "SELECT count(*) FROM eo.dead_letter"
PARKED = "SELECT count(*) FROM eo.parked_key"


class Shop:
    """An app that fails for some notes until it is mended, and a topic it reads."""

    def __init__(self, settings: Settings, database: Database, topic: str, after_dead: AfterDead) -> None:
        make_ledger(database.engine)
        self.database, self.settings, self.topic = database, settings, topic
        self.broken: set[str] = set()
        self.app = self._app(make_app(settings, database), after_dead)

    def _app(self, app: App, after_dead: AfterDead) -> App:
        out = Topic("live.out", dict)

        @app.handler(Topic(self.topic, dict, id="note"), retry=Retry(attempts=1), after_dead=after_dead)
        def book(message: Message[dict], tx: Tx) -> None:  # type: ignore[type-arg]
            note = message.payload["note"]
            if note in self.broken:
                raise ValueError("broken")
            tx.session.execute(text("INSERT INTO ledger (note) VALUES (:note)"), {"note": note})
            tx.publish(out, {"note": note})

        return app

    def send(self, *notes: str) -> None:
        """Each note's first letter is its key."""
        produce(
            self.settings.require_bootstrap_servers(),
            self.topic,
            [(note[:1].encode(), json.dumps({"note": note}).encode()) for note in notes],
        )

    def notes(self) -> list[str]:
        return column(self.database.engine, "SELECT note FROM ledger ORDER BY id")

    def reaches(self, statement: str, count: int) -> None:
        eventually(lambda: scalar(self.database.engine, statement) == count, f"{statement} is {count}", seconds=90)


@pytest.fixture
def make_shop(settings: Settings, database: Database, make_topic: MakeTopic) -> Callable[[AfterDead], Shop]:
    return lambda after_dead: Shop(settings, database, make_topic(), after_dead)


def test_replayed_letters_are_run_by_the_live_worker_once_and_in_order(make_shop: Callable[[AfterDead], Shop]) -> None:
    """Seen to fail without the deletion of the processed message: the drain took them for duplicates."""
    shop = make_shop("continue")
    shop.broken = {"a1", "a3"}
    with running(shop.app):
        shop.send("a1", "a2", "a3", "b1")
        shop.reaches(DEAD, 2)
        rows_reach(shop.database.engine, 2)
        letters = dead.letters(shop.database).items
        failing = dead.try_letter(shop.app, letters[0].id)
        assert failing.error is not None
        shop.broken = set()
        trial = dead.try_letter(shop.app, letters[0].id)
        assert [change.after["note"] for table in trial.tables for change in table.changes if change.after] == ["a1"]
        assert shop.notes() == ["a2", "b1"]
        done = dead.replay_all(shop.app)
        assert done.moved == [letter.id for letter in letters]
        rows_reach(shop.database.engine, 4)
        shop.reaches(PARKED, 0)
        shop.send("a1", "a3", "c1")  # the producer's duplicates
        rows_reach(shop.database.engine, 5)
    assert shop.notes() == ["a2", "b1", "a1", "a3", "c1"]
    assert scalar(shop.database.engine, DEAD) == 0
    assert scalar(shop.database.engine, "SELECT count(*) FROM eo.outbox_message") == 5


@pytest.mark.parametrize(
    ("decision", "expected"), [("replay", ["b1", "a1", "a2", "a3"]), ("discard", ["b1", "a2", "a3"])]
)
def test_a_held_key_goes_on_after_the_decision_though_nobody_ran_then(
    make_shop: Callable[[AfterDead], Shop], decision: str, expected: list[str]
) -> None:
    shop = make_shop("hold")
    shop.broken = {"a1"}
    with running(shop.app):
        shop.send("a1", "a2", "a3", "b1")
        shop.reaches(DEAD, 1)
        rows_reach(shop.database.engine, 1)
        shop.reaches("SELECT count(*) FROM eo.parked_message", 2)
    shop.broken = set()
    lane = dead.lanes(shop.database).items[0]
    assert (lane.key, lane.state, lane.messages) == (b"a", "held", 2)
    letter = dead.letters(shop.database).items[0]
    assert letter.holds
    if decision == "replay":
        dead.replay(shop.app, [letter.id])
    else:
        dead.discard(shop.database, [letter.id])
    with running(shop.app):
        rows_reach(shop.database.engine, len(expected))
        shop.reaches(PARKED, 0)
    assert shop.notes() == expected


def test_a_letter_that_dies_again_is_a_new_letter(make_shop: Callable[[AfterDead], Shop]) -> None:
    shop = make_shop("continue")
    shop.broken = {"a1"}
    with running(shop.app):
        shop.send("a1")
        shop.reaches(DEAD, 1)
        first = dead.letters(shop.database).items[0]
        dead.replay(shop.app, [first.id])
        shop.reaches(f"{DEAD} WHERE id > {first.id}", 1)
    second = dead.letters(shop.database).items[0]
    assert (second.record, second.attempts, second.message_id) == (first.record, 1, first.message_id)
    assert scalar(shop.database.engine, "SELECT count(*) FROM eo.processed_message") == 1
    assert scalar(shop.database.engine, PARKED) == 0


def test_after_forget_the_consumer_runs_once_and_then_the_letter_is_replayed(
    make_shop: Callable[[AfterDead], Shop],
) -> None:
    """Seen to fail without `has_started` in `_stranded`: it said to publish the payload anew, which was a duplicate."""
    shop = make_shop("continue")
    number = _buried(shop)
    ops.forget_positions(shop.database, Admin(shop.settings), shop.app.handlers[0].group)
    with pytest.raises(FailClosed) as refused:
        dead.replay(shop.app, [number])
    assert "eo run" in str(refused.value)
    assert "publish" not in str(refused.value)
    with running(shop.app):
        shop.reaches("SELECT count(*) FROM eo.position", 1)
    assert dead.replay(shop.app, [number]).moved == [number]
    with running(shop.app):
        rows_reach(shop.database.engine, 1)
        shop.reaches(PARKED, 0)
        shop.send("b1")
        rows_reach(shop.database.engine, 2)
    assert shop.notes() == ["a1", "b1"]


def test_the_payload_of_a_topic_that_was_re_created_is_published_anew_and_run_once(
    make_shop: Callable[[AfterDead], Shop],
) -> None:
    """Seen to fail without `_FORGET` in `discard`: with the id it had, it was lost as a duplicate."""
    shop = make_shop("continue")
    number = _buried(shop)
    with shop.database.begin("test") as connection:
        # What is left of an earlier topic of that name: its positions were forgotten, those of the new one are there.
        connection.exec_driver_sql("UPDATE eo.dead_letter SET topic_id = gen_random_uuid()")
    with pytest.raises(FailClosed, match="re-created") as refused:
        dead.replay(shop.app, [number])
    steps = rf"show {number} --payload > (\S+); eo dead discard {number} --forget-id; eo publish \S+ {shop.topic} < \1"
    assert re.search(steps, str(refused.value))
    saved = json.loads(dead.find(shop.database, number).record.value or b"")
    assert dead.discard(shop.database, [number], forget_id=True) == [number]
    with running(shop.app):
        shop.send(saved["note"], saved["note"], "b1")
        eventually(lambda: "b1" in shop.notes(), "what was sent last is run", seconds=90)
    assert shop.notes() == ["a1", "b1"]


def _buried(shop: Shop) -> int:
    """The letter of a message that would succeed by now."""
    shop.broken = {"a1"}
    with running(shop.app):
        shop.send("a1")
        shop.reaches(DEAD, 1)
    shop.broken = set()
    return dead.letters(shop.database).items[0].id
