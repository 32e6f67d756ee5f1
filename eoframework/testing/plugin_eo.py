"""What the fixture `eo` is: messages delivered to handlers, and what they did."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from eoframework import dead as dead_letters
from eoframework.app import App
from eoframework.crashtest.differences import changes
from eoframework.db.contents import Table, ours, published, read
from eoframework.db.dead_letter_desk import DeadLetter
from eoframework.db.session import open_database
from eoframework.errors import NotFound
from eoframework.handlers import Handler
from eoframework.kafka.producer import Outgoing
from eoframework.message import OutboxMessage, Record, new_id
from eoframework.parts import Part
from eoframework.parts import headers as encode_headers
from eoframework.schema import Schema
from eoframework.testing.plugin_bench import HandlerBench, Processing, TransformBench, bound, record_of
from eoframework.testing.plugin_watch import Watch
from eoframework.topic import Topic
from eoframework.transforms import Transform
from eoframework.trial import Trial

State = Mapping[str, Table]
What = App | Callable[..., Any]


class NotExactlyOnce(AssertionError):
    """The handler would do something twice, or something else, when a message runs again; the sentence says what."""


class NotProcessed(AssertionError):
    """The message did not end as the test expected: it failed for good, or did not."""


class Eo:
    """Handlers and transforms on a database of one test's own. No broker: the executor is the real one."""

    def __init__(self, url: str, *, schema: str) -> None:
        self.database_url = url
        self.database = open_database(url, Schema(schema))
        self._benches: dict[str, HandlerBench] = {}
        self._transforms: dict[str, TransformBench] = {}
        self._topics: dict[str, Topic[Any]] = {}
        self._allowed: set[str] = set()

    @property
    def engine(self) -> Engine:
        """The engine of the test's database."""
        return self.database.engine

    def __enter__(self) -> Eo:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for bench in self._benches.values():
            bench.close()
        self.engine.dispose()

    # --- what a test says ---

    def deliver(
        self,
        handler: What,
        topic: Topic[Any],
        payload: Any,
        *,
        key: Part | None = None,
        headers: Mapping[str, str | bytes] | None = None,
        id: UUID | str | None = None,  # noqa: A002 - the user's word for it
        dead: bool = False,
    ) -> dict[str, list[Any]]:
        """Deliver a message as its topic would: rolled back once, then for good, then a second time as a duplicate.

        handler: a function decorated by an App, or the App: then all its handlers and transforms of the topic.
        payload: of the topic's type; bytes are the record's value as it stands. dead: the message is to be given up
        (Reject, no attempts left); retries are not waited for.
        Returns what transforms send, payloads by topic name. Raises NotExactlyOnce when the handler leaves something
        behind that a rollback does not take back, does something else when called again, or something at the duplicate;
        NotProcessed when it failed for good (or with `dead`, did not); what a transform's function raises.
        """
        message = self._message(topic, payload, key=key, headers=headers, id=id)
        sent: dict[str, list[Any]] = {}
        for app, one in self._found(handler, topic):
            if isinstance(one, Handler):
                self._deliver(self._bench(app, one), message, dead=dead)
                continue
            for outgoing, decoded in self._transform(self._transform_bench(app, one), message, dead=dead):
                sent.setdefault(outgoing.topic, []).append(decoded)
        return sent

    def published(self, topic: Topic[Any] | str) -> list[Any]:
        """The payloads that wait in the outbox for this topic, in their order; as bytes for an unknown topic's name."""
        declared = self._topics.get(topic) if isinstance(topic, str) else topic
        name = topic if isinstance(topic, str) else topic.name
        with self.engine.connect() as connection:
            rows = [row for row in published(connection, self.database.schema) if row.topic == name]
        if declared is None:
            return [row.payload for row in rows]
        return [declared.decode_payload(Record(name, 0, 0, row.key, row.payload, row.headers, -1)) for row in rows]

    def dead(self) -> list[DeadLetter]:
        """The dead letters, the oldest first."""
        return list(dead_letters.letters(self.database, limit=10_000).items)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A Session on the test's database; committed at the end of the block, rolled back when it raises."""
        with Session(self.engine) as session, session.begin():
            yield session

    def allow(self, *names: str) -> None:
        """Variables ("shop.app.CACHE") that handlers may change, and addresses they may call, in this test."""
        self._allowed.update(names)

    # --- a handler ---

    def _deliver(self, bench: HandlerBench, message: OutboxMessage, *, dead: bool) -> None:
        group, record = bench.handler.group, record_of(message, offset=bench.next_offset)
        with Watch(bench.handler.function, self.engine, allowed=self._allowed) as watch:
            # With calls outside there is nothing to try: their results come with the delivery.
            trial = None if bench.handler.external else self._attempt(bench, record, watch)
            before, outbox = self._state(), self._outbox()
            processing = bench.process(record)
        after, outbox_after = self._state(), self._outbox()
        if trial is not None:
            new = outbox_after[len(outbox) :]
            _compare(group, trial, processing, before, after, new, ours=ours(self.database.schema))
        self._check_end(group, processing, dead=dead)
        if not processing.waits:
            self._again(bench, record_of(message, offset=bench.next_offset), after, outbox_after)

    def _attempt(self, bench: HandlerBench, record: Record, watch: Watch) -> Trial:
        """As if the process had died just before COMMIT: nothing may be left of it."""
        before, group = self._state(), bench.handler.group
        trial = bench.attempt(record)
        found = watch.found()
        for name, changed in changes(before, self._state()).items():
            rows = ", ".join(map(str, (*changed.new, *changed.gone)[:3]))
            found.append(
                f"it changed {name} outside its transaction ({rows}): on another connection, or by committing. Use "
                "tx.session"
            )
        if found:
            raise NotExactlyOnce(
                f"{group} was called for a message and rolled back, as if its process had died before COMMIT, and not "
                "all of it was undone: " + "; ".join(found)
            )
        return trial

    def _again(
        self, bench: HandlerBench, record: Record, before: State, outbox: list[tuple[str, bytes | None]]
    ) -> None:
        """Its producer sends it a second time, under the same id."""
        group, second = bench.handler.group, bench.process(record)
        if second.ran or not second.duplicate:
            raise NotExactlyOnce(f"{group}: the same message, delivered a second time, was not taken for a duplicate.")
        changed = changes(before, self._state())
        if changed or self._outbox() != outbox:
            what = ", ".join(changed) or "the outbox"
            raise NotExactlyOnce(f"{group}: the same message, delivered a second time, changed {what}.")

    def _check_end(self, group: str, processing: Processing, *, dead: bool) -> None:
        if processing.letter is None:
            if dead:
                state = "it waits for a person" if processing.waits else "it was processed"
                raise NotProcessed(f"{group} was to give the message up, and {state}.")
            return
        if dead:
            return
        letter = dead_letters.find(self.database, processing.letter)
        last = processing.failures[-1] if processing.failures else None
        raise NotProcessed(
            f"{group} gave the message up after {letter.attempts} attempt(s), {letter.cause}: {letter.error_class}: "
            f"{letter.error}. (If it should: eo.deliver(..., dead=True))\n{letter.traceback or ''}"
        ) from last

    # --- a transform ---

    def _transform(
        self, bench: TransformBench, message: OutboxMessage, *, dead: bool
    ) -> Iterator[tuple[Outgoing, Any]]:
        transform, record = bench.transform, record_of(message, offset=bench.next_offset)
        bench.next_offset += 1
        with Watch(transform.function, self.engine, allowed=self._allowed) as watch:
            try:
                first, second = bench.run(record), bench.run(record)
            except Exception:
                if dead:
                    return
                raise
            found = watch.found()
        if dead:
            raise NotProcessed(f"{transform.group} was to fail on the message, and did not.")
        if found:
            raise NotExactlyOnce(f"{transform.group} has effects besides what it sends: " + "; ".join(found))
        if [_identity(one) for one in first] != [_identity(one) for one in second]:
            raise NotExactlyOnce(
                f"{transform.group}, called twice for one message, sent something else the second time: "
                f"{[_identity(one) for one in first]}, then {[_identity(one) for one in second]} (topic, key, id). "
                "What it sends must follow from its message alone."
            )
        yield from ((one, bench.decoded(one)) for one in second)

    # --- what there is ---

    def _state(self) -> State:
        with self.engine.connect() as connection:
            return read(connection, self.database.schema)

    def _outbox(self) -> list[tuple[str, bytes | None]]:
        with self.engine.connect() as connection:
            return [(row.topic, row.key) for row in published(connection, self.database.schema)]

    def _message(
        self,
        topic: Topic[Any],
        payload: Any,
        *,
        key: Part | None,
        headers: Mapping[str, str | bytes] | None,
        id: UUID | str | None,  # noqa: A002 - as above
    ) -> OutboxMessage:
        self._topics.setdefault(topic.name, topic)
        if not isinstance(payload, bytes) or topic.payload_type is bytes:
            return topic.encode(payload, source="test", key=key, id=id, headers=headers)
        raw_key = topic.encode_key(None, key) if key is not None else None
        own = encode_headers(headers, topic.name)
        identity = topic.choose_id(None, id) or new_id()
        return OutboxMessage(identity, topic.name, raw_key, payload, topic.name, "test", topic.content_type, own)

    def _found(self, what: What, topic: Topic[Any]) -> list[tuple[App, Handler | Transform]]:
        apps = [what] if isinstance(what, App) else _apps_of(what)
        declared = [(app, one) for app in apps for one in _declared(app)]
        found = [(app, one) for app, one in declared if isinstance(what, App) or one.function is what]
        here = [(app, one) for app, one in found if one.topic.name == topic.name]
        if not here:
            _refuse(what, topic, [one.topic.name for _, one in found])
        for app in {app for app, _ in here}:
            self._topics.update({one.name: one for one in app.topics})
        return here

    def _bench(self, app: App, handler: Handler) -> HandlerBench:
        if handler.group not in self._benches:
            self._benches[handler.group] = HandlerBench(handler, bound(app, self.database))
        return self._benches[handler.group]

    def _transform_bench(self, app: App, transform: Transform) -> TransformBench:
        if transform.group not in self._transforms:
            self._transforms[transform.group] = TransformBench(transform, app)
        return self._transforms[transform.group]


def _compare(
    group: str,
    trial: Trial,
    processing: Processing,
    before: State,
    after: State,
    published_then: list[tuple[str, bytes | None]],
    *,
    ours: Collection[str],
) -> None:
    """The call that was rolled back and the one that counted must have done the same."""
    failed = bool(processing.failures) or processing.letter is not None
    if bool(trial.error) != failed and not processing.waits:
        first, second = ("failed", "did not") if trial.error else ("succeeded", "failed")
        why = trial.error or (processing.failures[0] if processing.failures else "see the dead letter")
        raise NotExactlyOnce(f"{group} {first} when it was first called, and {second} when it was called again: {why}.")
    if failed or processing.waits:
        return
    sizes = {name: changed.size for name, changed in changes(before, after).items()}
    tried = {
        table.table: (sum(c.before is not None for c in table.changes), sum(c.after is not None for c in table.changes))
        for table in trial.tables
        # Where something could not be found out, there is nothing to compare.
        if not table.note and table.table not in ours
    }
    unsure = {table.table for table in trial.tables if table.note}
    sizes = {name: size for name, size in sizes.items() if name not in unsure}
    if sizes != tried:
        raise NotExactlyOnce(
            f"{group} changed other rows when it was called again after a rollback: {_told(tried)}, then "
            f"{_told(sizes)}. It must follow from the message and the database alone."
        )
    first_published = [(message.topic, message.key) for message in trial.published]
    if sorted(first_published, key=repr) != sorted(published_then, key=repr):
        raise NotExactlyOnce(
            f"{group} published other messages when it was called again after a rollback: {first_published}, then "
            f"{published_then}."
        )


def _told(sizes: Mapping[str, tuple[int, int]]) -> str:
    told = [f"{name}: {gone} row(s) changed or deleted, {new} written" for name, (gone, new) in sizes.items()]
    return "; ".join(told) or "nothing"


def _identity(sent: Outgoing) -> tuple[str, bytes | None, str]:
    identity = next((value for name, value in sent.headers if name == "message-id"), b"")
    return sent.topic, sent.key, identity.decode() if isinstance(identity, bytes) else str(identity)


def _apps_of(function: Callable[..., Any]) -> list[App]:
    """The apps that the function is declared in: those of its own module first."""
    own = sys.modules.get(getattr(function, "__module__", ""))
    modules = [own] if own is not None else []
    modules += [module for module in list(sys.modules.values()) if module is not own]
    for module in modules:
        apps = [value for value in list(vars(module).values()) if isinstance(value, App)]
        found = [app for app in apps if any(one.function is function for one in _declared(app))]
        if found:
            return found[:1]
    return []


def _declared(app: App) -> list[Handler | Transform]:
    return [*app.handlers, *app.transforms]


def _refuse(what: What, topic: Topic[Any], others: list[str]) -> NoReturn:
    name = repr(what) if isinstance(what, App) else getattr(what, "__qualname__", repr(what))
    if others:
        raise NotFound(f"{name} handles {', '.join(sorted(set(others)))}, not {topic.name!r}.")
    raise NotFound(
        f"{name} is no handler or transform of an App that is imported.",
        remedy="Give the decorated function, or the App itself.",
    )
