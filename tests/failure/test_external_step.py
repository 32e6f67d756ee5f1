"""Calls outside the database, step by step: claimed, made, stored; and every way in which that can end early."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import make_url, text

from eoframework import App, External, ExternalCall, HandlerMisuse, Message, NotDone, Reject, RetryLater, Tx, events
from eoframework.db.external_calls import CallId, Claimed, ExternalCallRows, Standing, forget_external_calls
from eoframework.db.session import Database, open_database
from eoframework.errors import LostConnection, Retryable
from eoframework.external import MAX_RESULT, CallUnresolved, InFlight, idempotency_key
from eoframework.prune import PruneWorker
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.consume.harness import scalar
from tests.failure.calls import Order, Step, end_lease, handler_with, order, orders, row, run_handler
from tests.proxy import Moment, Proxy, proxy_to

DAY = timedelta(days=1)


class Receiver:
    """The world outside: keeps what it was asked, and answers as it is told."""

    def __init__(self) -> None:
        self.asked: list[ExternalCall] = []
        self.error: Exception | None = None
        self.during: Any = None

    def __call__(self, message: Message[Order], call: ExternalCall) -> object:
        self.asked.append(call)
        if self.during is not None:
            self.during()
        if self.error is not None:
            raise self.error
        return {"order": message.payload.order_id, "call": len(self.asked)}


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


def step_of(database: Database, receiver: Receiver, policy: Any = "ask", *, owner: str = "one", **options: Any) -> Step:
    return Step(database, handler_with(External("charge", receiver, unresolved=policy, **options)), owner)


class TestTheWay:
    def test_the_result_is_stored_and_the_next_run_makes_no_call(self, database: Database, receiver: Receiver) -> None:
        """Seen to fail with `if row.done` removed from ExternalCallRows.claim: nobody found the result."""
        first = step_of(database, receiver).prepare()
        again = step_of(database, receiver, owner="two").prepare()
        assert first == again == {"charge": {"order": 1, "call": 1}}
        key = idempotency_key("shop.pay", order().id or uuid.uuid4(), "charge")
        assert receiver.asked == [ExternalCall(key, attempt=1, fence=1)]

    def test_the_claim_is_committed_before_and_no_transaction_is_open_during_the_call(
        self, database: Database, receiver: Receiver
    ) -> None:
        seen: list[tuple[int, int]] = []
        receiver.during = lambda: seen.append(
            (
                scalar(database.engine, "SELECT count(*) FROM eo.external_call WHERE done_at IS NULL"),
                scalar(
                    database.engine,
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND xact_start IS NOT NULL AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
                ),
            )
        )
        step_of(database, receiver).prepare()
        assert seen == [(1, 0)]

    def test_each_message_and_each_name_is_a_call_of_its_own(self, database: Database, receiver: Receiver) -> None:
        handler = handler_with(External("charge", receiver), External("mail", receiver))
        step = Step(database, handler)
        assert list(step.prepare(order(1)) or ()) == ["charge", "mail"]
        step.prepare(order(2, offset=1))
        assert len({call.key for call in receiver.asked}) == 4

    def test_a_message_without_an_id_is_known_by_its_place(self, database: Database, receiver: Receiver) -> None:
        step = step_of(database, receiver)
        nameless = Message(Order(order_id=1), None, None, (), "orders", 3, 14, None)
        assert step.prepare(nameless) == step.prepare(nameless)
        other = Message(Order(order_id=1), None, None, (), "orders", 3, 15, None)
        step.prepare(other)
        assert len(receiver.asked) == 2

    def test_the_handler_gets_what_json_gives_back_in_the_first_run_too(self, database: Database) -> None:
        step = Step(database, handler_with(External("f", lambda message, call: {1: ("a", None)})))
        assert step.prepare() == step.prepare() == {"f": {"1": ["a", None]}}

    def test_none_is_a_result(self, database: Database, receiver: Receiver) -> None:
        calls: list[int] = []
        step = Step(database, handler_with(External("f", lambda message, call: calls.append(1))))
        assert step.prepare() == step.prepare() == {"f": None}
        assert len(calls) == 1

    def test_a_processed_message_is_not_called_for(self, database: Database, receiver: Receiver) -> None:
        """Seen to fail with `WHERE NOT processed` removed from db/external_calls.py: the duplicate was charged."""
        step = step_of(database, receiver)
        Step(database, handler_with()).commit()
        assert step.prepare() is None
        assert receiver.asked == []

    def test_nothing_declared_touches_nothing(self, database: Database) -> None:
        assert Step(database, handler_with()).prepare() == {}

    def test_events(self, database: Database, receiver: Receiver) -> None:
        seen: list[str] = []
        unsubscribe = events.subscribe(lambda name, _: seen.append(name))
        try:
            step_of(database, receiver).prepare()
        finally:
            unsubscribe()
        assert seen == ["external.claimed", "external.called", "external.stored"]


class TestUnresolved:
    def timeout(self, database: Database, receiver: Receiver, policy: str) -> Step:
        """A call that ended with an error which proves nothing."""
        step = step_of(database, receiver, policy)
        receiver.error = TimeoutError("no answer")
        with pytest.raises(TimeoutError):
            step.prepare()
        receiver.error = None
        return step

    def test_ask(self, database: Database, receiver: Receiver) -> None:
        """Seen to fail with `Open` taken as `Claimed` in ExternalCallRows.claim: called a second time."""
        step = self.timeout(database, receiver, "ask")
        with pytest.raises(CallUnresolved, match=r"may have happened.*TimeoutError.*eo external resolve \d+") as raised:
            step.prepare()
        assert isinstance(raised.value, Reject)
        assert len(receiver.asked) == 1

    def test_retry_with_the_same_key(self, database: Database, receiver: Receiver) -> None:
        step = self.timeout(database, receiver, "retry")
        assert step.prepare() == {"charge": {"order": 1, "call": 2}}
        first, second = receiver.asked
        assert first.key == second.key
        assert (second.attempt, second.fence) == (2, 2)

    def test_give_up(self, database: Database, receiver: Receiver) -> None:
        step = self.timeout(database, receiver, "give_up")
        with pytest.raises(Reject, match="given up"):
            step.prepare()
        assert len(receiver.asked) == 1

    def test_another_worker_need_not_wait_for_a_lease_whose_call_has_ended(
        self, database: Database, receiver: Receiver
    ) -> None:
        self.timeout(database, receiver, "retry")
        assert step_of(database, receiver, "retry", owner="two").prepare() is not None
        assert len(receiver.asked) == 2

    def test_a_claim_of_our_own_without_a_result_is_unresolved_before_its_lease_ends(
        self, database: Database, receiver: Receiver
    ) -> None:
        step = step_of(database, receiver)
        receiver.error = KeyboardInterrupt()  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            step.prepare()
        with pytest.raises(CallUnresolved):
            step.prepare()

    @pytest.mark.parametrize("result", [object(), float("nan"), "x" * MAX_RESULT, {"a": {1}}])
    def test_a_result_that_cannot_be_stored_is_never_retried(
        self, database: Database, receiver: Receiver, result: object
    ) -> None:
        def odd(message: Message[Order], call: ExternalCall) -> object:
            receiver.asked.append(call)
            return result

        step = Step(database, handler_with(External("odd", odd)))
        with pytest.raises(CallUnresolved, match=r"was made, but what it returned is .*JSON.*not stored"):
            step.prepare()
        with pytest.raises(CallUnresolved, match="may have happened"):
            step.prepare()
        assert len(receiver.asked) == 1

    def test_the_largest_result(self, database: Database) -> None:
        result = "\0" + "x" * (MAX_RESULT - 8)
        step = Step(database, handler_with(External("big", lambda message, call: result)))
        assert step.prepare() == step.prepare() == {"big": result}


class TestNotDone:
    def test_it_is_called_again_whatever_the_policy(self, database: Database, receiver: Receiver) -> None:
        step = step_of(database, receiver, "ask")
        receiver.error = NotDone("refused", after=30)
        with pytest.raises(RetryLater) as raised:
            step.prepare()
        assert raised.value.after == 30
        receiver.error = None
        assert step_of(database, receiver, "ask", owner="two").prepare() == {"charge": {"order": 1, "call": 2}}

    def test_a_caller_from_before_cannot_store_for_whoever_came_after_it(
        self, database: Database, receiver: Receiver
    ) -> None:
        """Seen to fail with the row deleted by _RELEASE: fences began at 1 again, and the stale result was stored."""
        step, rows = step_of(database, receiver), ExternalCallRows(database.schema)
        call = CallId(step.stream.consumer_id, uuid.uuid4(), "charge")

        def claim(owner: str) -> Standing:
            with database.begin("test") as connection:
                return rows.claim(connection, call, place=(0, 0), owner=owner, lease=60, again=True)

        assert claim("frozen") == Claimed(1, 1)
        end_lease(database)
        assert claim("refused") == Claimed(2, 2)
        with database.begin("test") as connection:
            assert rows.release(connection, call, 2, "NotDone")
        assert claim("third") == Claimed(3, 3)
        with database.begin("test") as connection:
            assert not rows.store(connection, call, 1, '"stale"')
            assert not rows.release(connection, call, 1, "NotDone")
            assert not rows.leave(connection, call, 1, "TimeoutError")
            assert rows.store(connection, call, 3, '"mine"')


class TestLease:
    def test_while_it_runs_nobody_else_calls(self, database: Database, receiver: Receiver) -> None:
        """Seen to fail with `seconds_left > 0` replaced by False: two calls were under way at once."""
        other = step_of(database, receiver, "retry", owner="two")
        met: list[InFlight] = []

        def meanwhile() -> None:
            receiver.during = None
            with pytest.raises(InFlight, match="one may be making it") as raised:
                other.prepare()
            met.append(raised.value)

        receiver.during = meanwhile
        step_of(database, receiver, "retry", owner="one", lease=30).prepare()
        assert len(receiver.asked) == 1
        assert 0 < (met[0].after or 0) <= 30
        assert other.prepare() == {"charge": {"order": 1, "call": 1}}

    def test_a_call_that_outlasts_its_lease_does_not_store_over_its_successor(self, database: Database) -> None:
        """The late one comes back while the successor's call is under way.

        Seen to fail with `AND fence = ...` removed from _MINE: the handler would have used the late one's result.
        """
        inside, late_is_back = threading.Event(), threading.Event()

        def wait(message: Message[Order], call: ExternalCall) -> str:
            inside.set()
            assert late_is_back.wait(20)
            return "successor"

        def outlast(message: Message[Order], call: ExternalCall) -> str:
            end_lease(database)
            thread.start()
            assert inside.wait(20)
            return "late"

        successor = Step(database, handler_with(External("charge", wait, unresolved="retry")), "two")
        late = Step(database, handler_with(External("charge", outlast, unresolved="retry")), "one")
        thread = threading.Thread(target=successor.prepare)
        try:
            with pytest.raises(InFlight, match="outlasted its lease"):
                late.prepare()
        finally:
            late_is_back.set()
            thread.join(20)
        assert late.prepare() == {"charge": "successor"}
        assert (row(database).fence, row(database).calls) == (2, 2)

    def test_a_call_that_outlasts_its_lease_stores_its_result_if_nobody_took_over(
        self, database: Database, receiver: Receiver
    ) -> None:
        receiver.during = lambda: end_lease(database)
        step = step_of(database, receiver)
        assert step.prepare() == step.prepare()
        assert len(receiver.asked) == 1


class TestOutages:
    """The connection is cut at a COMMIT around the call: what this process knows is not forgotten."""

    @pytest.fixture
    def proxied(self, database_url: str) -> Iterator[tuple[Database, Proxy]]:
        url = make_url(database_url)
        assert url.host
        with proxy_to(url.host, url.port or 5432) as proxy:
            through = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
            opened = open_database(through, Schema())
            yield opened, proxy
            opened.engine.dispose()

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_at_the_claim(self, proxied: tuple[Database, Proxy], receiver: Receiver, moment: Moment) -> None:
        """Seen to fail ("after") without `_unmade`: a person was asked about a call that nobody had made."""
        database, proxy = proxied
        step = step_of(database, receiver, "ask")
        proxy.arm(moment)
        with pytest.raises(LostConnection):
            step.prepare()
        assert receiver.asked == []
        assert step.prepare() == {"charge": {"order": 1, "call": 1}}
        assert row(database).fence == (1 if moment == "before" else 2)

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_at_the_result(self, proxied: tuple[Database, Proxy], receiver: Receiver, moment: Moment) -> None:
        """Seen to fail ("before") without `_unstored`: the call counted as unresolved with its result at hand."""
        database, proxy = proxied
        step = step_of(database, receiver, "ask")
        receiver.during = lambda: proxy.arm(moment)
        with pytest.raises(LostConnection):
            step.prepare()
        receiver.during = None
        # Another message comes first: what is kept is stored all the same.
        step.prepare(order(2, offset=1))
        assert step.prepare() == {"charge": {"order": 1, "call": 1}}
        assert len(receiver.asked) == 2

    def test_a_result_kept_through_an_outage_is_not_stored_over_a_successor(
        self, proxied: tuple[Database, Proxy], receiver: Receiver
    ) -> None:
        database, proxy = proxied
        step = step_of(database, receiver, "retry")
        receiver.during = lambda: proxy.arm("before")
        with pytest.raises(LostConnection):
            step.prepare()
        receiver.during = None
        end_lease(database)
        assert step_of(database, receiver, "retry", owner="two").prepare() == {"charge": {"order": 1, "call": 2}}
        assert step.prepare() == {"charge": {"order": 1, "call": 2}}

    def test_at_the_note_that_it_failed(self, proxied: tuple[Database, Proxy], receiver: Receiver) -> None:
        """The database's trouble comes first: it is no attempt of the message."""
        database, proxy = proxied
        step = step_of(database, receiver, "retry")
        receiver.error = TimeoutError()
        receiver.during = lambda: proxy.arm("before")
        with pytest.raises(LostConnection):
            step.prepare()
        receiver.error = receiver.during = None
        assert step.prepare() == {"charge": {"order": 1, "call": 2}}


class TestTheHandler:
    def step(self, database: Database, receiver: Receiver) -> Step:
        with database.begin("test") as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS ledger (note text)"))
        app = App("shop")

        @app.handler(orders, external=[External("charge", receiver)])
        def pay(order: Order, tx: Tx) -> None:
            receipt = tx.external("charge")
            tx.session.execute(text("INSERT INTO ledger VALUES (:n)"), {"n": str(receipt["call"])})

        return Step(database, app.handlers[0])

    def test_it_reads_the_result(self, database: Database, receiver: Receiver) -> None:
        run_handler(database, self.step(database, receiver), order())
        assert scalar(database.engine, "SELECT note FROM ledger") == "1"
        assert row(database).settled_at is not None

    def test_tried_by_hand_it_gets_what_is_stored(self, database: Database, receiver: Receiver) -> None:
        step = self.step(database, receiver)
        with database.begin("test") as connection:
            assert step.calls.stored(connection, order()) == {}
        expected = step.prepare()
        with database.begin("test") as connection:
            assert step.calls.stored(connection, order()) == expected
        assert len(receiver.asked) == 1

    def test_a_name_that_is_not_declared(self, database: Database) -> None:
        app = App("shop")

        @app.handler(orders)
        def pay(order: Order, tx: Tx) -> None:
            tx.external("charge")

        with pytest.raises(HandlerMisuse, match=r"tx.external\('charge'\): there is no result"):
            run_handler(database, Step(database, app.handlers[0]), order())

    def test_a_message_that_was_processed_a_moment_ago_runs_again(self, database: Database, receiver: Receiver) -> None:
        """Its id was there for the call, and is gone for the handler: somebody is replaying it."""
        step = self.step(database, receiver)
        step.commit()
        with pytest.raises(Retryable, match="processed a moment ago"):
            run_handler(database, step, order())
        assert receiver.asked == []


class TestForgetting:
    def age(self, database: Database, days: float) -> None:
        with database.engine.begin() as connection:
            for table, column in (
                ("external_call", "claimed_at"),
                ("external_call", "done_at"),
                ("external_call", "settled_at"),
                ("processed_message", "processed_at"),
            ):
                connection.execute(text(f"UPDATE eo.{table} SET {column} = {column} - interval '{days} days'"))

    def test_a_settled_result_goes_after_the_id_of_its_message(self, database: Database, receiver: Receiver) -> None:
        """Seen to fail with the NOT EXISTS removed from _FORGET: the result went while the id was there."""
        step = step_of(database, receiver)
        step.prepare()
        step.commit()
        self.age(database, 8)
        assert forget_external_calls(database, older_than=7 * DAY, limit=10) == 0
        with database.begin("test") as connection:
            connection.execute(text("DELETE FROM eo.processed_message"))
        assert forget_external_calls(database, older_than=7 * DAY, limit=10) == 1

    def test_what_is_not_settled_stays(self, database: Database, receiver: Receiver) -> None:
        """Seen to fail with `settled_at` replaced by `done_at`: a consumer that had been stopped called again."""
        step = step_of(database, receiver)
        step.prepare()
        self.age(database, 100)
        assert forget_external_calls(database, older_than=7 * DAY, limit=10) == 0
        assert step.prepare() == {"charge": {"order": 1, "call": 1}}

    def test_the_prune_worker_forgets_both(self, database: Database, receiver: Receiver, settings: Settings) -> None:
        step = step_of(database, receiver)
        for number in range(3):
            step.prepare(order(number, offset=number))
            step.commit(order(number, offset=number))
        self.age(database, 8)
        worker = PruneWorker(database, settings.model_copy(update={"prune_batch": 2}))
        while not worker.drained():
            worker.step()
        assert scalar(database.engine, "SELECT count(*) FROM eo.external_call") == 0
        assert scalar(database.engine, "SELECT count(*) FROM eo.processed_message") == 0


def test_what_the_call_says_is_not_logged(
    database: Database, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """It may quote the payload, and EO_FAILURE_TEXT=false forbids that. Seen to fail with the error in the warning."""
    with database.engine.begin() as connection:
        connection.exec_driver_sql(
            """CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                RAISE EXCEPTION 'deadlock detected' USING ERRCODE = 'deadlock_detected'; END $$;
            CREATE TRIGGER trouble BEFORE UPDATE ON eo.external_call FOR EACH ROW EXECUTE FUNCTION trouble()"""
        )
    receiver.error = ValueError("card 4711")
    with pytest.raises(Retryable, match="deadlock"):
        step_of(database, receiver).prepare()
    assert "ended with ValueError; it counts as unresolved" in caplog.text
    assert "4711" not in caplog.text
