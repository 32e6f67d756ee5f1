"""The App: what handles which topic, and publishing from anywhere. Opens nothing until it is asked to."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Unpack, overload
from uuid import UUID

from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker
from typing_extensions import TypeVar

from eoframework.db import publishing
from eoframework.db.outbox import Outbox
from eoframework.db.publishing import PublishTarget
from eoframework.db.session import Database, open_database
from eoframework.decorators import BatchHandlerDecorator, HandlerDecorator, TransformDecorator, TransformOptions
from eoframework.errors import ConfigurationError, DeclarationError
from eoframework.external import External
from eoframework.handlers import Handler, declare
from eoframework.parts import Part
from eoframework.producer import Producer
from eoframework.retry import AfterDead, Breaker, FailurePolicy, Ordering, Retry
from eoframework.schema import Schema
from eoframework.settings import Settings
from eoframework.signatures import Start
from eoframework.topic import Topic
from eoframework.transforms import Transform, declare_transform
from eoframework.tx import tx_of
from eoframework.where import declaring_frame, location

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")

_NAME = re.compile(r"[a-z0-9._-]{1,100}")
_RETRY = Retry()
_BREAKER = Breaker()

_identity = id


class App:
    """A named set of handlers over one database. Its name is part of every consumer group: choose it for good."""

    def __init__(
        self,
        name: str,
        *,
        engine: Engine | None = None,
        session_factory: sessionmaker[Session] | None = None,
        settings: Settings | None = None,
        topics: Iterable[Topic[Any]] = (),
    ) -> None:
        """Declare an app; connects to nothing.

        engine, session_factory: default from the settings (EO_DATABASE_URL). topics: those that only some other module
        names, for `eo topics apply`. Raises DeclarationError.
        """
        frame = declaring_frame()
        self.where = location(frame)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise DeclarationError(
                f"{self.where}: App({name!r}): the name is not usable.", remedy="Use 1 to 100 of a-z 0-9 . _ -"
            )
        self.name = name
        self._engine = engine
        self._session_factory = session_factory
        self._settings = settings
        self._database: Database | None = None
        self._outbox: Outbox | None = None
        self._producer: Producer | None = None
        self._handlers: dict[str, Handler] = {}
        self._transforms: dict[str, Transform] = {}
        self._topics: dict[int, Topic[Any]] = {_identity(topic): topic for topic in topics}
        self._modules = {str(frame.f_globals.get("__name__"))}
        # Web servers publish from many threads; two engines made at once would mean two pools.
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"App({self.name!r})"

    # --- declaring ---

    def handler(
        self,
        topic: Topic[T],
        *,
        name: str | None = None,
        start: Start = "earliest",
        retry: Retry | None = _RETRY,
        ordering: Ordering = "key",
        after_dead: AfterDead = "continue",
        dead_letter_topic: bool = False,
        max_parked: int = 10_000,
        breaker: Breaker | None = _BREAKER,
        external: Sequence[External] = (),
    ) -> HandlerDecorator[T]:
        """Call the decorated function for every message of `topic`, each in one database transaction.

        On a crash: what the function did through `tx` was committed together with the message's position, or not at
        all, and then the function runs again.
        The function takes `(payload)`, `(payload, tx: Tx)` or `(message: Message[T], tx: Tx)`, and stays plain.
        name: default the function's; it names the consumer group `<app>.<name>`: keep it when the function is renamed.
        start: where a consumer that has never run begins.
        retry: what to do when it fails; None stops its partition there (EO_ON_FAILURE). ordering: what waits behind a
        failing message: its "key", its whole "partition", or "none". after_dead: whether its key goes on ("continue")
        or is held until a person has decided ("hold"). dead_letter_topic: dead letters are published to `<group>.dlt`
        too. max_parked: with so many messages waiting, partitions pause. breaker: stops the consumer (exit code 70)
        when too many would die. external: calls outside the database, made before the transaction begins, one message
        at a time; see External. Raises DeclarationError with file and line.
        """
        policy = FailurePolicy(retry, ordering, after_dead, dead_letter_topic, max_parked, breaker)
        return HandlerDecorator(
            lambda f: self._declare(f, topic, policy, name=name, start=start, external=tuple(external))
        )

    def batch_handler(
        self,
        topic: Topic[T],
        *,
        name: str | None = None,
        max_batch: int | None = None,
        start: Start = "earliest",
        retry: Retry | None = _RETRY,
        ordering: Ordering = "key",
        after_dead: AfterDead = "continue",
        dead_letter_topic: bool = False,
        max_parked: int = 10_000,
        breaker: Breaker | None = _BREAKER,
    ) -> BatchHandlerDecorator[T]:
        """Call the decorated function with lists of messages of `topic`, each list in one database transaction.

        On a crash: as for `handler`, for the list as a whole. A list that fails is rolled back and halved until the
        culprit is alone; `tx.fail(i, error)` or `raise BatchItemFailed(i)` names it and spares the search.
        The function takes `(batch: list[T], tx: Tx)` or `(batch: list[Message[T]], tx: Tx)`.
        max_batch: at most so many messages, default from the settings. The rest as for `handler`.
        """
        policy = FailurePolicy(retry, ordering, after_dead, dead_letter_topic, max_parked, breaker)
        return BatchHandlerDecorator(
            lambda f: self._declare(f, topic, policy, name=name, start=start, batch=True, max_batch=max_batch)
        )

    @overload
    def transform(
        self, source: Topic[T], *, to: Topic[R], **options: Unpack[TransformOptions]
    ) -> TransformDecorator[T, R]: ...
    @overload
    def transform(
        self, source: Topic[T], *, to: tuple[Topic[R], Topic[S]], **options: Unpack[TransformOptions]
    ) -> TransformDecorator[T, R | S]: ...
    @overload
    def transform(
        self, source: Topic[T], *, to: Collection[Topic[Any]], **options: Unpack[TransformOptions]
    ) -> TransformDecorator[T, Any]: ...
    def transform(
        self,
        source: Topic[T],
        *,
        to: Topic[Any] | Collection[Topic[Any]],
        name: str | None = None,
        start: Start = "earliest",
        max_batch: int | None = None,
        retry: Retry | None = _RETRY,
        breaker: Breaker | None = _BREAKER,
    ) -> TransformDecorator[T, Any]:
        """Send what the decorated function makes of every message of `source` to other topics.

        On a crash: `read_committed` readers see what it made of a message once, all of it or nothing, in order per key.
        A message that its producer sent twice counts twice: where that matters use `handler` and `tx.publish`.
        The function takes `(payload: T)` or `(message: Message[T])` and returns None, a payload, an Out, or several of
        them (list, tuple, or by `yield`). One that takes `list[T]` or `list[Message[T]]` gets many messages, and
        returns a list with one such entry for each. It has no effects besides: it may run again.
        to: the topics it sends to, none of them `source`. A payload goes to the topic that carries its class; Out names
        one. An output without a key of its own keeps its message's key.
        name: default the function's; it names the consumer group `<app>.<name>`, whose offsets are the truth.
        max_batch: at most so many messages in one list. retry: its partition waits while a message is tried again; one
        that is given up goes to `<group>.dlt`. None stops it there. start, breaker: as for `handler`.
        Raises DeclarationError with file and line. Source: KIP-98, KIP-447.
        """
        policy = FailurePolicy(retry, ordering="partition", breaker=breaker)
        return TransformDecorator(
            lambda f: self._declare_transform(f, source, to, policy, name=name, start=start, max_batch=max_batch)
        )

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """The transforms, in the order of their declaration."""
        return tuple(self._transforms.values())

    @property
    def groups(self) -> frozenset[str]:
        """The consumer groups of all that is declared here."""
        return frozenset([one.group for one in self.handlers] + [one.group for one in self.transforms])

    @property
    def handlers(self) -> tuple[Handler, ...]:
        """The handlers, in the order of their declaration."""
        return tuple(self._handlers.values())

    @property
    def topics(self) -> tuple[Topic[Any], ...]:
        """Every topic known here: read or sent to, given to the App, published to, or named in one of its modules.

        The modules are the App's own and those of its functions; a topic that is only published appears in them by the
        name it is used by.
        """
        found = dict(self._topics)
        functions = [one.function for one in self.handlers] + [one.function for one in self.transforms]
        for module in sorted(self._modules | {function.__module__ for function in functions}):
            for value in list(vars(sys.modules[module]).values()) if module in sys.modules else ():
                if isinstance(value, Topic):
                    found.setdefault(_identity(value), value)
        return tuple(found.values())

    # --- what the worker needs ---

    @property
    def settings(self) -> Settings:
        """The settings, loaded when first asked for. Raises ConfigurationError."""
        with self._lock:
            if self._settings is None:
                self._settings = Settings.load()
            return self._settings

    @property
    def database(self) -> Database:
        """The database of the handlers: the engine given, else the one the settings name. Raises ConfigurationError."""
        with self._lock:
            if self._database is None:
                schema = Schema(self.settings.database_schema)
                engine = self._given_engine()
                url = self.settings.require_database_url() if engine is None else ""
                self._database = Database(engine, schema) if engine is not None else open_database(url, schema)
            return self._database

    @property
    def session_factory(self) -> sessionmaker[Session]:
        """Makes the Sessions that handlers get."""
        with self._lock:
            if self._session_factory is None:
                self._session_factory = sessionmaker(self.database.engine)
            return self._session_factory

    def _given_engine(self) -> Engine | None:
        engine = self._engine
        if engine is None and self._session_factory is not None:
            engine = self._session_factory.kw.get("bind")
        if engine is not None and not isinstance(engine, Engine):
            raise ConfigurationError(
                f"{self!r} has a {type(engine).__name__} for an engine.",
                remedy="Handlers run in threads: give create_engine(...)'s; AsyncSessions can publish without it.",
            )
        return engine

    # --- publishing ---

    @property
    def producer(self) -> Producer:
        """Sends to Kafka without a database, in the app's name; made when first asked for.

        On a crash: see `Producer`. Ended by `close()`, else at the end of the process. Raises ConfigurationError.
        """
        settings = self.settings
        with self._lock:
            if self._producer is None:
                self._producer = Producer(settings, source=self.name)
            return self._producer

    def close(self) -> None:
        """Wait for what `app.producer` has sent, and end it; another one is made if it is asked for again.

        Raises what `Producer.close` raises.
        """
        with self._lock:
            producer, self._producer = self._producer, None
        if producer is not None:
            producer.close()

    def publish(
        self,
        target: PublishTarget,
        topic: Topic[T],
        payload: T,
        *,
        key: Part | None = None,
        id: UUID | str | None = None,  # noqa: A002 - the user's word for it
        headers: Mapping[str, str | bytes] | None = None,
        delay: timedelta | float | None = None,
        deliver_at: datetime | None = None,
    ) -> None:
        """Publish `payload` if and when the transaction of `target` commits; never otherwise, and once.

        On a crash: it stands in Kafka once if the transaction was committed, not at all if it was not. Messages of one
        key reach their topic in the order of their commits. A savepoint rolled back takes along what was published
        inside; a Session joined to an outer transaction publishes with that. SAVEPOINT, COMMIT or ROLLBACK sent as text
        is not seen. Not a coroutine, also for an AsyncSession.
        key: overrides the topic's. id: names the message for consumers, unique in its topic over all publishers.
        delay: seconds or a timedelta; deliver_at: an aware datetime. A delayed message leaves its key's order.
        Raises EncodeError at once; ConfigurationError for AUTOCOMMIT and two-phase transactions.
        """
        self._topics.setdefault(_identity(topic), topic)
        session = publishing.session_of(target)
        tx = tx_of(session) if session is not None else None
        if tx is not None:
            # A handler's Session: its messages are written with its position, and get ids that a re-run repeats.
            tx.publish(topic, payload, key=key, id=id, headers=headers, delay=delay, deliver_at=deliver_at)
            return
        message = topic.encode(
            payload, source=self.name, key=key, id=id, headers=headers, delay=delay, deliver_at=deliver_at
        )
        publishing.publish(target, self._publishing_outbox(), message)

    def _publishing_outbox(self) -> Outbox:
        if self._outbox is None:
            with self._lock:
                self._outbox = self._outbox or Outbox(Schema(self.settings.database_schema))
        return self._outbox

    def _declare(
        self,
        function: Callable[..., object],
        topic: Topic[Any],
        policy: FailurePolicy,
        *,
        name: str | None,
        start: Start,
        batch: bool = False,
        max_batch: int | None = None,
        external: Sequence[External] = (),
    ) -> None:
        self._check_topic(topic, "handler(topic)")
        handler = declare(
            function,
            topic,
            app_name=self.name,
            name=name,
            batch=batch,
            max_batch=max_batch,
            start=start,
            policy=policy,
            external=external,
            names=declaring_frame().f_locals,
        )
        self._check_name("handler", handler)
        self._handlers[handler.name] = handler
        self._topics.setdefault(_identity(topic), topic)

    def _declare_transform(
        self,
        function: Callable[..., object],
        source: Topic[Any],
        to: Topic[Any] | Collection[Topic[Any]],
        policy: FailurePolicy,
        *,
        name: str | None,
        start: Start,
        max_batch: int | None,
    ) -> None:
        self._check_topic(source, "transform(topic, to=...)")
        made = declare_transform(
            function,
            source,
            to=to,
            app_name=self.name,
            name=name,
            max_batch=max_batch,
            start=start,
            policy=policy,
            names=declaring_frame().f_locals,
        )
        self._check_name("transform", made)
        self._transforms[made.name] = made
        for topic in (source, *made.targets):
            self._topics.setdefault(_identity(topic), topic)

    def _check_topic(self, topic: object, usage: str) -> None:
        if not isinstance(topic, Topic):
            raise DeclarationError(
                f"{location(declaring_frame())}: {self!r}: {topic!r} is no Topic.",
                remedy=f"Write @app.{usage} with a Topic.",
            )

    def _check_name(self, kind: str, made: Handler | Transform) -> None:
        first = self._handlers.get(made.name) or self._transforms.get(made.name)
        if first is not None:
            raise DeclarationError(
                f"{made.where}: {kind} {made.name!r} is declared a second time (first: {first.where}): both would be "
                f"the group {made.group!r}, and each would get only a part of the messages.",
                remedy="Give one of them another name='...'.",
            )
