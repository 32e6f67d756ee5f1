"""A member of a consumer group that hands out batches of records and never decides where a partition starts.

Offsets come from the claim (PostgreSQL), never from the group. Callbacks run inside `fetch`, on the same thread; they
never raise: an exception out of the client's poll would leave records behind that it has counted as handed out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, OFFSET_INVALID, Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as ClientMessage

from eoframework import clock, events
from eoframework.errors import ConfigurationError, EoError, RestartNeeded, Retryable
from eoframework.kafka.answers import FORBIDDEN, REFUSED_LOGIN
from eoframework.kafka.config import is_incremental
from eoframework.kafka.contact import Contact
from eoframework.kafka.faults import classify, kafka_error
from eoframework.kafka.membership import Membership
from eoframework.kafka.offsets import offset_mark, offset_out_of_range
from eoframework.kafka.records import Fetched

log = logging.getLogger(__name__)
_client_log = logging.getLogger("eoframework.kafka.client")

_LOG_IS_NOT_WHAT_IT_WAS = frozenset({KafkaError._AUTO_OFFSET_RESET, KafkaError._LOG_TRUNCATION})
_NOT_STARTED = frozenset({KafkaError._STATE, KafkaError._PREV_IN_PROGRESS})
_FAREWELL_SECONDS = 5.0
_SEEK_ATTEMPTS = 500
_SEEK_PAUSE = 0.01


class GroupConsumer:
    """One group member on one topic, used from one thread.

    `on_assigned(partitions)` returns where each partition starts; None keeps it paused until `start` is called.
    """

    def __init__(
        self,
        config: dict[str, Any],
        topic: str,
        *,
        on_assigned: Callable[[list[int]], Mapping[int, int | None]],
        on_revoked: Callable[[list[int]], None],
    ) -> None:
        self._topic = topic
        self._group = str(config["group.id"])
        self._on_assigned = on_assigned
        self._on_revoked = on_revoked
        self._incremental = is_incremental(config)
        self._handed: dict[int, int] = {}
        """Where we stand: the offset after the last record handed out, or where the partition was started."""
        self._client_at: dict[int, int] = {}
        """The client's own position after the last clean fetch: ours, or further on past transaction markers."""
        self._rebalances = 0
        self._callback_error: BaseException | None = None
        self._leaving = False
        self._broken: KafkaError | None = None
        """Why the client will never hand out anything again."""
        self.ended: dict[int, int] = {}
        """Partitions read to their end (with `enable.partition.eof`), and that end: markers lie before it."""
        self._consumer = Consumer({**config, "error_cb": self._on_error, "on_commit": self._on_commit})
        self.contact = Contact(self._consumer, topic, config)
        self._consumer.subscribe([topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._revoked)

    # --- fetching ---

    def fetch(self, limit: int, timeout: float, *, linger: float = 0.0) -> list[Fetched]:
        """Up to `limit` records, waiting at most `timeout` seconds for the first; raises what a person must see.

        linger: seconds to wait for more of them after the first.

        If anything raises on the way, or a rebalance happened, what was fetched is dropped and every partition goes
        back to where it stood: the loss guard.
        """
        self._raise_if_broken()
        self._check_nothing_was_lost()
        self._client_at.clear()
        before = self._rebalances
        try:
            messages = self._poll(limit, timeout, linger)
        except BaseException as error:
            self._raise_callback_error()
            self.rewind(self._handed)
            if isinstance(error, (KafkaException, KafkaError)):
                raise classify(error, f"fetching from {self._topic}") from error
            raise
        self._raise_callback_error()
        if self._rebalances != before:
            self._refuse_lost_log(messages)
            # A record fetched under the old claim may lie beyond the new claim's position: taking it would skip all
            # records between. Dropping the batch costs one fetch.
            self.rewind(self._handed)
            return []
        records = self._ours(messages)
        self._raise_if_broken()
        self._client_at = self._client_positions()
        events.emit("kafka.polled", records=len(records))
        return records

    def _poll(self, limit: int, timeout: float, linger: float) -> list[ClientMessage]:
        # consume(n, t) waits the full t unless n is reached; poll for the first, then take what is there.
        first = self._consumer.poll(timeout)
        if first is None:
            return []
        return [first, *self._consumer.consume(limit - 1, linger)] if limit > 1 else [first]

    def _ours(self, messages: list[ClientMessage]) -> list[Fetched]:
        records: list[Fetched] = []
        behind: set[int] = set()
        handed, ended = self._handed, self.ended
        for message in messages:
            if (error := message.error()) is not None:
                self._notice(message, error)
                continue
            partition, offset = message.partition() or 0, message.offset() or 0
            stands = handed.get(partition)
            if stands is None:
                continue
            if offset < stands:  # it would move the position back: a leftover, or where the partition waited (`_start`)
                behind.add(partition)
                continue
            handed[partition] = offset + 1
            if ended:
                ended.pop(partition, None)
            records.append(Fetched(partition, offset, message))
        if behind:
            self.rewind({partition: handed[partition] for partition in behind})
        return records

    def _refuse_lost_log(self, messages: list[ClientMessage]) -> None:
        # Told once: dropped with the rest, it would leave a partition that is silent for ever and cannot be sought.
        for message in messages:
            error = message.error()
            if error is None or self._ends_with(error):
                continue
            if error.code() in _LOG_IS_NOT_WHAT_IT_WAS and message.partition() in self._handed:
                self._notice(message, error)

    def _notice(self, message: ClientMessage, error: KafkaError) -> None:
        """In-band errors: stop for what would be silent loss, note the rest."""
        code = error.code()
        if code == KafkaError._PARTITION_EOF:
            self.ended[message.partition() or 0] = message.offset() or 0
        elif code in _LOG_IS_NOT_WHAT_IT_WAS:
            raise offset_out_of_range(self._group, self._topic, message.partition(), error.str())
        elif code in FORBIDDEN or code in REFUSED_LOGIN:
            raise ConfigurationError(
                f"Kafka refuses topic {self._topic!r}: {error.str()}.",
                remedy="Grant this client Read on topic and group.",
            )
        elif code == KafkaError._MAX_POLL_EXCEEDED:
            log.warning(
                "a batch took longer than max_poll_interval; the group took our partitions, they are claimed again"
            )
        elif not self._ends_with(error):
            log.warning("kafka: %s; nothing is lost, the client tries again", error.str())

    def _check_nothing_was_lost(self) -> None:
        """The client may only be where we stand, or where the last clean fetch left it: past markers.

        Further on lies a record that it took out and nobody got. Seen: an exception out of consume() lost 115 of 200
        records this way.
        """
        for partition, offset in self._client_positions().items():
            stands = self._handed[partition]
            if offset not in {stands, self._client_at.get(partition)}:
                log.warning(
                    "%s[%d]: client at %d, handled up to %d; the records between are fetched again",
                    self._topic,
                    partition,
                    offset,
                    stands,
                )
                events.emit("kafka.loss_guarded", partition=partition)
                self.rewind({partition: stands})

    def _client_positions(self) -> dict[int, int]:
        """What the client counts as handed out; a partition from which it has handed out nothing is left out."""
        wanted = [TopicPartition(self._topic, partition) for partition in self._handed]
        found = self._consumer.position(wanted) if wanted else []
        return {at.partition: at.offset for at in found if at.offset != OFFSET_INVALID}

    # --- moving about ---

    def rewind(self, offsets: Mapping[int, int]) -> None:
        """Fetch again from these offsets; a partition that is no longer assigned is left alone."""
        for partition, offset in tuple(offsets.items()):
            self._handed[partition] = offset
            self._client_at.pop(partition, None)
            self.ended.pop(partition, None)
            if not self._seek(TopicPartition(self._topic, partition, offset)):
                self._handed.pop(partition, None)

    def _seek(self, where: TopicPartition) -> bool:
        """False if the partition is no longer assigned.

        A partition just assigned cannot be moved before the client's own thread has started it, which takes a moment
        longer when others are still being stopped.
        """
        for _ in range(_SEEK_ATTEMPTS):
            try:
                self._consumer.seek(where)
            except KafkaException as fault:
                if where.partition not in self.assigned():
                    return False
                if kafka_error(fault).code() not in _NOT_STARTED:
                    raise classify(fault, f"seek {self._topic}[{where.partition}] to {where.offset}") from fault
            else:
                return True
            clock.sleep(_SEEK_PAUSE)
        raise RestartNeeded(f"{self._topic}[{where.partition}] is assigned, but the client does not start fetching it.")

    def start(self, partition: int, offset: int) -> None:
        """Begin (or begin again) a paused partition at `offset`."""
        # In this order: the other way round the client looks at it again a second later (1.0 s against 1 ms). What it
        # fetches between the two is dropped by the seek.
        self._consumer.resume([TopicPartition(self._topic, partition)])
        self.rewind({partition: offset})

    def pause(self, partitions: Iterable[int]) -> None:
        """Fetch nothing of these until `start`; what was fetched of them is dropped."""
        mine = self.assigned()
        for partition in partitions:
            self._handed.pop(partition, None)
            if partition in mine:
                self._consumer.pause([TopicPartition(self._topic, partition)])

    def assigned(self) -> set[int]:
        """The partitions the group says are ours; PostgreSQL may know better."""
        return {found.partition for found in self._consumer.assignment()}

    def read_to_the_end(self, partitions: Iterable[int], watermarks: Callable[[str, int], tuple[int, int]]) -> bool:
        """Whether all there is of these has been handed out (with `enable.partition.eof`).

        For the client a partition ends where the oldest open transaction begins. What a predecessor committed a moment
        ago may lie behind that: its markers are written after its commit is confirmed. So the log's own end counts.
        """
        try:
            return all(p in self.ended and self.ended[p] >= watermarks(self._topic, p)[1] for p in partitions)
        except Retryable as trouble:
            log.info("%s: %s Whether all of it was read is asked again", self._topic, trouble)
            return False

    def membership(self) -> Membership:
        """As whom we fetched: to be asked right after `fetch`, for a Kafka transaction that moves the group's offsets.

        Raises NotAMember.
        """
        return Membership.read(self._consumer.consumer_group_metadata())

    def committed(self, partitions: Iterable[int], *, timeout: float) -> dict[int, tuple[int, str] | None]:
        """The group's offset of each partition and its metadata, None where there is none; raises Retryable.

        Offsets of a Kafka transaction that has not ended are waited for, `timeout` seconds: they may still become the
        group's. Source: KIP-447, "require stable".
        """
        asked = [TopicPartition(self._topic, partition) for partition in partitions]
        try:
            found = self._consumer.committed(asked, timeout=timeout)
        except KafkaException as fault:
            raise classify(fault, f"reading the offsets of group {self._group}") from fault
        for failed in (at.error for at in found if at.error is not None):
            raise classify(failed, f"reading the offsets of group {self._group}")
        return {at.partition: (at.offset, at.metadata or "") if at.offset >= 0 else None for at in found}

    def commit(self, offsets: Mapping[int, tuple[int, int]], *, wait: bool = False) -> None:
        """Tell the group where we stand (partition -> offset, epoch), for lag tools only; a failure is harmless."""
        marks = [self._marked(partition, *at) for partition, at in offsets.items()]
        try:
            if wait:
                self._consumer.commit(offsets=marks, asynchronous=False)
            else:
                self._consumer.commit(offsets=marks)
        except KafkaException as fault:
            self._on_commit(kafka_error(fault), marks)

    def mark(self, partition: int, offset: int, epoch: int) -> None:
        """Put our mark on the group's offset, before anything is processed; raises Retryable if that failed."""
        try:
            done = self._consumer.commit(offsets=[self._marked(partition, offset, epoch)], asynchronous=False)
        except KafkaException as fault:
            raise Retryable(f"committing {self._topic}[{partition}]: {kafka_error(fault).str()}.") from fault
        for failed in (entry.error for entry in done or () if entry.error is not None):
            raise Retryable(f"committing {self._topic}[{partition}]: {failed.str()}.")
        events.emit("kafka.offset_marked", partition=partition, offset=offset)

    def _marked(self, partition: int, offset: int, epoch: int) -> TopicPartition:
        return TopicPartition(self._topic, partition, offset, metadata=offset_mark(epoch))

    def close(self, offsets: Mapping[int, tuple[int, int]]) -> None:
        """Commit these and leave the group; without a goodbye if Kafka does not answer within 5 s."""
        # While the coordinator is away a commit waits 45 s, and so do closing and even dropping a client that has one
        # under way: longer than an orchestrator waits after SIGTERM. A daemon thread may be left behind inside it.
        self._leaving = True
        farewell = threading.Thread(target=self._leave, args=(offsets,), name="leaving the group", daemon=True)
        farewell.start()
        farewell.join(_FAREWELL_SECONDS)
        if farewell.is_alive():
            log.warning(
                "left the group of %s without a goodbye: Kafka does not answer; nothing is lost, the group gives our "
                "partitions to others after its session timeout",
                self._topic,
            )

    def _leave(self, offsets: Mapping[int, tuple[int, int]]) -> None:
        if offsets:
            self.commit(offsets, wait=True)
        self._consumer.close()

    # --- callbacks: inside fetch and close; they never raise ---

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._rebalances += 1
        starts: Mapping[int, int | None] = {}
        try:
            # What a member is given while it leaves is another's in a moment: a claim made now, after all others were
            # released, would stay behind, and its successor would be as careful as after a crash.
            if not self._leaving:
                starts = self._on_assigned([p.partition for p in partitions])
        except BaseException as error:  # noqa: BLE001 - kept and raised by fetch; here it would lose records
            self._callback_error = error
        where = [TopicPartition(self._topic, p.partition, _start(starts.get(p.partition))) for p in partitions]
        if self._incremental:
            consumer.incremental_assign(where)
        else:
            self._handed.clear()
            consumer.assign(where)
        for assigned in where:
            start = starts.get(assigned.partition)
            if start is None:
                consumer.pause([assigned])
            else:
                # A pause outlives a revocation: without this, a partition that was paused when it was lost comes back
                # paused, and stands still for ever.
                consumer.resume([assigned])
                self._handed[assigned.partition] = start

    def _revoked(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._rebalances += 1
        for gone in partitions:
            self._handed.pop(gone.partition, None)
            self.ended.pop(gone.partition, None)
        try:
            self._on_revoked([p.partition for p in partitions])
        except BaseException as error:  # noqa: BLE001 - kept and raised by fetch
            self._callback_error = error

    def _on_error(self, error: KafkaError) -> None:
        if not self._ends_with(error):
            # Its logger drops repetitions: seen, 900 of these within a second, about an outage that was over.
            _client_log.warning("kafka: %s; nothing is lost, the client reconnects by itself", error.str())

    def _on_commit(self, error: KafkaError | None, _offsets: list[TopicPartition]) -> None:
        if error is None:
            events.emit("kafka.offsets_committed")
        elif not self._ends_with(error):
            log.info("group offsets not committed: %s; lag tools show an old value, nothing else", error.str())

    def _ends_with(self, error: KafkaError) -> bool:
        """Whether the client is broken for good, which `fetch` then raises.

        Where it says so depends on the request that found out: a heartbeat tells `poll`, a commit only its callback.
        Then it is silent for ever, like a topic in which nothing happens. And what it hands over as a message, or to
        a commit's callback, is _FATAL but does not call itself fatal.
        """
        if not error.fatal() and error.code() != KafkaError._FATAL:
            return False
        self._broken = self._broken or error
        return True

    def _raise_if_broken(self) -> None:
        if self._broken is not None:
            raise RestartNeeded(f"the Kafka consumer of {self._topic!r} cannot go on: {self._broken.str()}.")

    def _raise_callback_error(self) -> None:
        if self._callback_error is not None:
            error, self._callback_error = self._callback_error, None
            if isinstance(error, EoError):
                raise error
            raise RestartNeeded(f"an assignment of {self._topic!r} could not be taken over: {error!r}.") from error


def _start(offset: int | None) -> int:
    # One that waits for its claim is paused, but may be fetched from before that: at an offset that the log has, then.
    # The client asks the broker which. An answer that comes after `start` makes it ask again and go there from wherever
    # it is by then: from the beginning, `_ours` takes it back; from the end, it had skipped what lies between.
    return OFFSET_BEGINNING if offset is None else offset
