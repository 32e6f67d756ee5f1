"""One Kafka transaction of a Producer: collected, produced, committed; and what to believe when its end is unclear.

Messages are held back until the block ends, or until there are more of them than fit here: a Kafka transaction that is
open keeps every read_committed reader of its partitions waiting, and one that has not begun needs no abort.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar
from uuid import UUID

from eoframework import clock
from eoframework.errors import (
    Abortable,
    EncodeError,
    EoError,
    Fenced,
    OutcomeUnknown,
    Permanent,
    RestartNeeded,
    Retryable,
)
from eoframework.kafka.answers import NotAuthorized, UnknownTopic
from eoframework.kafka.config import sending_transaction_config
from eoframework.kafka.destinations import Destination
from eoframework.kafka.outcome import was_committed
from eoframework.kafka.producer import REQUEST_SHARE, Outgoing, Rejected
from eoframework.kafka.transaction import TransactionalProducer
from eoframework.parts import Part
from eoframework.producer_records import Draft, Headers, Item
from eoframework.sent import Batch, Sent
from eoframework.settings import Settings
from eoframework.topic import Topic

_log = logging.getLogger(__name__)

T = TypeVar("T")

_HELD = 1000
_HELD_BYTES = 1_000_000
_PAUSE = 0.2
_NOTHING = "The Kafka transaction was aborted: readers see nothing of it."
_FENCED_REMEDY = "Give each process its own name=, or none; if this is the rightful one, make another Producer."
_NEVER = threading.Event()

Prepare = Callable[[Item, float], tuple[Draft, Destination]]


class Turn:
    """What a Producer's transactions share: the client, whose turn it is, and whether another has taken over."""

    def __init__(self, settings: Settings, *, transactional_id: str, shared: bool) -> None:
        """shared: whether other processes may use the same transactional.id."""
        self.settings = settings
        self.transactional_id = transactional_id
        self.patience = settings.transaction_timeout
        self._shared = shared
        self._lock = threading.Lock()
        self._holder = ""
        self._taken_over = ""
        self._closed = False
        self._client: TransactionalProducer | None = None

    @property
    def taken(self) -> bool:
        """Whether a transaction is open."""
        return self._lock.locked()

    @property
    def client(self) -> TransactionalProducer:
        """The transactional client; made when first needed."""
        if self._client is None:
            config = sending_transaction_config(self.settings, transactional_id=self.transactional_id)
            self._client = TransactionalProducer(config, reports=True)
        return self._client

    def take(self) -> None:
        """Begin; raises Permanent or Fenced."""
        if self._closed:
            raise Permanent(f"{self.transactional_id}: its Producer is closed.", remedy="Make another Producer.")
        if self._taken_over:
            raise Fenced(f"{self._taken_over}.", remedy=_FENCED_REMEDY)
        if not self._lock.acquire(blocking=False):
            raise Permanent(
                f"{self.transactional_id}: a Kafka transaction is open already, in thread {self._holder}; a Producer "
                "has one at a time.",
                remedy="End that block first, use one Producer per thread, or send both in one transaction.",
            )
        self._holder = threading.current_thread().name

    def release(self) -> None:
        """End."""
        self._lock.release()

    def close(self) -> None:
        """End the client; at the end of a process also under an open transaction, which Kafka then aborts."""
        self._closed = True
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def fenced(self, error: EoError, *, open_for: float) -> EoError:
        """What being fenced means: a Producer of the same name, or a transaction that was open for too long."""
        if self._shared:
            # Which of the two Kafka does not say. Going on would fence a rightful successor, and they would take turns.
            self._taken_over = (
                f"{self.transactional_id}: another Producer of this name has taken over, or the transaction was open "
                f"for more than {self.patience:g} s ({error.what})"
            )
            return Fenced(f"{self._taken_over} {_NOTHING}", remedy=_FENCED_REMEDY)
        return Retryable(
            f"{self.transactional_id}: the transaction was open for {open_for:.1f} s and Kafka has ended it "
            f"({error.what}) {_NOTHING}",
            remedy="Do slow work before the block, or raise EO_TRANSACTION_TIMEOUT.",
        )


class KafkaTransaction:
    """`with producer.transaction() as t`: what is sent through `t` is visible together, or not at all."""

    def __init__(self, turn: Turn, prepare: Prepare) -> None:
        self._turn = turn
        self._prepare = prepare
        self._batch = Batch()
        self._held: list[Outgoing] = []
        self._held_bytes = 0
        self._destinations: dict[str, Destination] = {}
        self._thread = self._process = 0
        self._begun: float | None = None
        self._sized: set[str] = set()
        self._state = "new"
        self._broken: EoError | None = None

    def __enter__(self) -> KafkaTransaction:
        if self._state != "new":
            raise Permanent("a transaction is used once.", remedy="Call producer.transaction() for each block.")
        self._turn.take()
        self._state, self._thread, self._process = "open", threading.get_ident(), os.getpid()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._process != os.getpid():
            # Its messages are the parent's to send; here they would be committed a second time.
            if error is None:
                raise self._forked()
            return
        try:
            if error is not None:
                self._abort()
                return
            if self._broken is not None:
                raise self._broken
            if self._batch.tickets:
                self._commit()
            self._state = "committed"
        except BaseException:
            # Also when the user interrupts it: nothing is known then of what the client was doing.
            if self._begun is not None:
                self._turn.client.doubt("a transaction did not end well")
            raise
        finally:
            if self._state == "open":
                self._state = "aborted"
            self._turn.release()

    @property
    def sent(self) -> list[Sent]:
        """Where the messages stand, in the order they were sent; after the block. Raises Permanent before."""
        if self._state != "committed":
            raise Permanent(f"{self._turn.transactional_id}: the transaction is {self._state}; nothing is sent yet.")
        return self._batch.sent

    def send(
        self,
        topic: Topic[T],
        payload: T,
        *,
        key: Part | None = None,
        id: UUID | str | None = None,  # noqa: A002 - the user's word for it
        headers: Headers = None,
        traceparent: str | None = None,
    ) -> UUID:
        """Add a message; returns its id. Readers see it if and when the block ends well.

        Parameters as for `Producer.send`. Raises EncodeError or ConfigurationError: this message is not part of it, the
        others are. Any other error breaks the transaction; the block then raises it even if it was caught inside.
        """
        self._check_open()
        deadline = clock.monotonic() + self._turn.patience
        item = Item(topic, payload, key, id, headers, traceparent)
        try:
            draft, destination = self._prepare(item, deadline)
        except Retryable as error:
            # Nothing is wrong with the message: caught in the block, it would be missing from what is committed.
            self._abort()
            self._broken = self._aborted(error)
            raise self._broken from error
        ticket = self._batch.ticket(draft.id, destination, draft.size)
        self._destinations.setdefault(draft.topic, destination)
        self._held.append(draft.record(ticket))
        self._held_bytes += draft.size
        if len(self._held) >= _HELD or self._held_bytes >= _HELD_BYTES:
            self._guarded(self._produce)
        return draft.id

    def _forked(self) -> Permanent:
        return Permanent(
            f"{self._turn.transactional_id}: the transaction belongs to process {self._process}, not to its fork.",
            remedy="Leave the fork with os._exit() inside the block, or fork before it.",
        )

    def _check_open(self) -> None:
        if self._state == "open" and self._process != os.getpid():
            raise self._forked()
        if self._state != "open":
            raise Permanent(
                f"{self._turn.transactional_id}: the transaction is {self._state}; nothing was sent.",
                remedy="Send inside the block: with producer.transaction() as t: t.send(...).",
            )
        if threading.get_ident() != self._thread:
            raise Permanent(
                f"{self._turn.transactional_id}: a transaction belongs to the thread of its with block.",
                remedy="Collect the payloads and send them there.",
            )
        if self._broken is not None:
            raise self._broken

    # --- the steps ---

    def _begin(self) -> None:
        client = self._turn.client
        for destination in self._destinations.values():
            if destination.limit is not None:
                client.limit_request(int(destination.limit * REQUEST_SHARE))
        self._sized = set(self._destinations)
        client.make_ready()
        client.begin()
        self._begun = clock.monotonic()

    def _produce(self) -> None:
        if self._begun is None:
            self._begin()
        client = self._turn.client
        held, self._held, self._held_bytes = self._held, [], 0
        for record in held:
            client.send([record])
            # The size of requests is fixed while a transaction is open; of a topic that came later and may take less,
            # one record at a time.
            if record.topic not in self._sized:
                client.flush()

    def _commit(self) -> None:
        client = self._turn.client
        self._guarded(self._produce)
        self._guarded(client.flush)
        if len(self._batch.sent) < len(self._batch.tickets):
            # Something else than a record was refused, such as the right to write to a topic, and the client dropped
            # them all. Its commit says what it was, without sending one.
            self._guarded(client.commit)
            raise self._unknown("it was committed", "messages of it were dropped")
        try:
            client.commit()
        except EoError as error:
            self._resolve(error)

    def _abort(self) -> None:
        self._held.clear()
        if self._begun is None:
            return
        self._turn.client.abort()
        if self._turn.client.found_fenced:
            # Unheard, the next transaction's new client would fence the rightful successor.
            self._turn.fenced(Fenced("aborting"), open_for=self._open_for())

    def _guarded(self, step: Callable[[], None]) -> None:
        """Do what, if it fails, surely leaves nothing: no commit was sent."""
        try:
            step()
        except (Retryable, Abortable, Fenced, RestartNeeded, Rejected) as error:
            self._abort()
            self._broken = self._aborted(error)
            raise self._broken from error
        except EoError as error:
            self._abort()
            self._broken = error
            raise
        except BaseException as error:
            # Such as what a signal handler raises, between two records: caught in the block, the rest would be missing.
            self._abort()
            self._broken = Permanent(f"{self._turn.transactional_id}: interrupted by {error!r}. {_NOTHING}")
            raise

    # --- what went wrong ---

    def _aborted(self, error: EoError) -> EoError:
        if isinstance(error, Fenced):
            return self._turn.fenced(error, open_for=self._open_for())
        refused = self._batch.failure
        if refused is not None and not isinstance(refused, OutcomeUnknown):
            return type(refused)(f"{refused.what} {_NOTHING}", remedy=refused.remedy)
        if isinstance(error, Rejected) and error.topic_trouble:
            return _topic_trouble(error)
        if isinstance(error, Rejected):
            return EncodeError(f"{error.what} {_NOTHING}", remedy="Correct the message.")
        return Retryable(f"{error.what} {_NOTHING}", remedy="Run it again; the same id= may be used.")

    def _resolve(self, error: EoError) -> None:
        """Return when it was committed after all, raise what is so otherwise."""
        _log.warning(
            "%s: the answer to a commit is missing (%s); reading in the log whether it happened.",
            self._turn.transactional_id,
            error.what,
        )
        try:
            deadline = clock.monotonic() + self._turn.patience
            if not isinstance(error, Fenced):
                self._end_what_is_open(deadline)
            committed = self._read_back(deadline)
        except EoError as why:
            raise self._unknown(error.what, why.what) from error
        if committed:
            _log.info("%s: it was committed; nothing is lost.", self._turn.transactional_id)
            return
        raise self._aborted(error) from error

    def _end_what_is_open(self, deadline: float) -> None:
        while True:
            try:
                self._turn.client.make_ready()
                return
            except (Retryable, Abortable, RestartNeeded):
                if clock.monotonic() >= deadline:
                    raise
                clock.wait(_NEVER, _PAUSE)

    def _read_back(self, deadline: float) -> bool:
        # Compaction may have taken a record that was committed; of another one that says nothing.
        places = [
            (sent, ticket.destination)
            for sent, ticket in zip(self._batch.results, self._batch.tickets, strict=True)
            if isinstance(sent, Sent)
        ]
        sent, destination = next((place for place in places if not place[1].compacted), places[0])
        found = was_committed(self._turn.settings, sent.topic, sent.partition, sent.offset, sent.id, deadline=deadline)
        if not found and destination.compacted:
            raise Retryable(f"{sent.topic} is compacted, or its settings may not be read.")
        return found

    def _unknown(self, error: str, why: str) -> OutcomeUnknown:
        topics = tuple(sorted(self._destinations))
        return OutcomeUnknown(
            f"{self._turn.transactional_id}: the commit of {len(self._batch.tickets)} messages to {', '.join(topics)} "
            f"was not answered ({error}), and the log does not tell whether it happened ({why})",
            ids=tuple(ticket.id for ticket in self._batch.tickets),
            topics=topics,
        )

    def _open_for(self) -> float:
        return 0.0 if self._begun is None else clock.monotonic() - self._begun


def _topic_trouble(error: Rejected) -> EoError:
    if error.kind == "TOPIC_AUTHORIZATION_FAILED":
        remedy = "Grant WRITE on the topic to this principal (kafka-acls), or use another one (EO_KAFKA_SASL_*)."
        return NotAuthorized(f"{error.what} {_NOTHING}", remedy=remedy)
    return UnknownTopic(f"{error.what} {_NOTHING}", remedy="Run: eo topics apply MODULE:APP")
