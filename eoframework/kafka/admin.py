"""Questions about topics, groups and offsets, and the making of topics. Every call blocks; thread-safe."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import UUID

from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # its stubs do not re-export
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ConfigSource,
    NewTopic,
    OffsetSpec,
    ResourceType,
)

from eoframework import clock
from eoframework.errors import ConfigurationError, EoError, Permanent, Retryable, Unreachable
from eoframework.kafka.answers import FORBIDDEN, REFUSED_LOGIN, NotAuthorized, UnknownTopic, meaning
from eoframework.kafka.config import admin_config, offset_reader_config
from eoframework.kafka.faults import kafka_error
from eoframework.settings import Settings

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_TIMEOUT = 15.0
_PROBE_TIMEOUT = 3.0
_GRACE = 1.0
# A refused group is told only after this. Transforms ask inside a transaction that PostgreSQL ends after 4 s of silence
# (db/session.py): beyond that they would be told of that for ever, and never of the missing right.
_OFFSETS_TIMEOUT = 3.0
_SLICE = 0.1

_IN_USE = frozenset({KafkaError.NON_EMPTY_GROUP, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.REBALANCE_IN_PROGRESS})


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """A topic as it is: `id` differs from the one of an earlier topic of the same name."""

    name: str
    id: UUID
    partitions: int
    replicas: int
    config: Mapping[str, str] = field(default_factory=dict)
    """Every setting in effect, defaults included."""
    own_config: Mapping[str, str] = field(default_factory=dict)
    """Only the settings made on the topic itself."""


class Admin:
    """A client that asks and creates; opens its connection at the first question."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._servers = settings.require_bootstrap_servers()
        self._config = {**admin_config(settings), "error_cb": self._on_error}
        self._refusal: KafkaError | None = None
        self._trouble = ""
        self._lock = threading.Lock()
        self._client_made: AdminClient | None = None

    @property
    def _client(self) -> AdminClient:
        with self._lock:
            if self._client_made is None:
                try:
                    self._client_made = AdminClient(self._config)
                except KafkaException as error:
                    text = kafka_error(error).str()
                    raise ConfigurationError(f"Kafka's settings: {text}.", remedy="Correct EO_KAFKA_*.") from error
            return self._client_made

    def wait_until_reachable(self, *, stop: threading.Event | None = None, wait: bool = True) -> bool:
        """Return True once the cluster answers, False when `stop` was set first.

        Waits for ever and says so; with `wait=False` raises Unreachable after about 3 s. A refused login raises
        NotAuthorized at once: time does not mend a wrong password.
        """
        stop = stop or threading.Event()
        told = False
        while not stop.is_set():
            try:
                self._ask_cluster(_PROBE_TIMEOUT, stop)
                if told:
                    _log.info("Kafka at %s answers again; going on.", self._servers)
                return not stop.is_set()
            except Retryable as error:
                if not wait:
                    raise Unreachable(
                        f"Kafka at {self._servers} cannot be reached ({self._trouble or error.what}).",
                        remedy="Start it, or correct EO_KAFKA_BOOTSTRAP_SERVERS.",
                    ) from error
                if not told:
                    _log.warning(
                        "Kafka at %s cannot be reached (%s); waiting for it. Nothing is lost.",
                        self._servers,
                        self._trouble or error.what,
                    )
                    told = True
                clock.wait(stop, clock.jitter(0.5, 1.5))
        return False

    def cluster_id(self) -> str:
        """The cluster's id: a position belongs to one cluster."""
        return str(self._ask_cluster(_TIMEOUT, None).cluster_id)

    def broker_count(self) -> int:
        """How many brokers answer for the cluster now."""
        return len(self._ask_cluster(_TIMEOUT, None).nodes)

    def broker_config(self, name: str) -> str | None:
        """A setting of the brokers, as one of them has it; None when this principal may not read it."""
        node = self._ask_cluster(_TIMEOUT, None).nodes[0]
        resource = ConfigResource(ResourceType.BROKER, str(node.id))
        future = self._client.describe_configs([resource], request_timeout=_TIMEOUT)[resource]
        try:
            entries = self._result(future, f"reading the brokers' {name}")
        except NotAuthorized as error:
            _log.debug("%s: %s", name, error)
            return None
        return str(entries[name].value) if name in entries else None

    def describe(self, topic: str, *, settings_optional: bool = False) -> TopicInfo:
        """The topic as it is. Raises UnknownTopic, NotAuthorized.

        With `settings_optional`, a principal that may use the topic but not read its settings sees it without any.
        """
        what = f"describing topic {topic}"
        futures = self._client.describe_topics(TopicCollection([topic]), request_timeout=_TIMEOUT)
        found = self._result(futures[topic], what, topic=topic)
        resource = ConfigResource(ResourceType.TOPIC, topic)
        configs = self._client.describe_configs([resource], request_timeout=_TIMEOUT)
        try:
            entries = self._result(configs[resource], f"reading the settings of topic {topic}", topic=topic)
        except NotAuthorized as error:
            if not settings_optional:
                raise
            _log.debug("topic %s: %s", topic, error)
            entries = {}
        own = int(ConfigSource.DYNAMIC_TOPIC_CONFIG.value)
        return TopicInfo(
            name=topic,
            id=_uuid(found.topic_id),
            partitions=len(found.partitions),
            replicas=min((len(partition.replicas) for partition in found.partitions), default=0),
            config={name: str(entry.value) for name, entry in entries.items()},
            own_config={name: str(entry.value) for name, entry in entries.items() if int(entry.source) == own},
        )

    def ask_topic_id(self, topic: str) -> Callable[[], UUID]:
        """The topic's id: asked now, the answer taken later by calling what is returned.

        That call raises UnknownTopic, NotAuthorized, Retryable.
        """
        future = self._client.describe_topics(TopicCollection([topic]), request_timeout=_PROBE_TIMEOUT)[topic]

        def answer() -> UUID:
            try:
                found = self._result(future, f"asking the id of topic {topic}", topic=topic, timeout=_PROBE_TIMEOUT)
            except Permanent as error:
                # Asked beside a batch of messages, for whose own failure it would be taken: they would be given up.
                raise Retryable(error.what) from error
            return _uuid(found.topic_id)

        return answer

    def existing(self, topics: Iterable[str]) -> dict[str, TopicInfo]:
        """Those of the topics that exist."""
        found = {}
        for topic in topics:
            try:
                found[topic] = self.describe(topic)
            except UnknownTopic:
                continue
        return found

    def create(self, topic: str, *, partitions: int, replicas: int, config: Mapping[str, str]) -> None:
        """Create the topic; one that somebody else created meanwhile is left as it is."""
        new = NewTopic(topic, num_partitions=partitions, replication_factor=replicas, config=dict(config))
        future = self._client.create_topics([new], request_timeout=_TIMEOUT)[topic]
        self._result(future, f"creating topic {topic}", topic=topic, ignore=KafkaError.TOPIC_ALREADY_EXISTS)
        self._await_leaders(topic, partitions)

    def set_config(self, topic: str, changes: Mapping[str, str]) -> None:
        """Set these settings on the topic and leave its others alone."""
        entries = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in changes.items()
        ]
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=entries)
        future = self._client.incremental_alter_configs([resource], request_timeout=_TIMEOUT)[resource]
        self._result(future, f"changing the settings of topic {topic}", topic=topic)

    def group_offsets(self, group: str, topic: str, *, stable: bool = True) -> dict[int, tuple[int, str]]:
        """The group's committed offsets of the topic: partition -> (offset, metadata); empty when it has none.

        Raises Retryable while a Kafka transaction may still move them; `stable=False` asks what they are until then.
        """
        # Not by the admin client: it crashes the process (SIGSEGV in librdkafka 2.16.0) when the broker answers
        # NOT_COORDINATOR, as one does that has just started; a consumer has the coordinator whose lack it trips over.
        questions = [TopicPartition(topic, partition) for partition in range(self._partitions(topic))]
        if not questions:
            return {}
        told: list[KafkaError] = []
        isolation = {} if stable else {"isolation.level": "read_uncommitted"}
        reader = offset_reader_config(self._settings, group=group)
        consumer = Consumer({**reader, **isolation, "error_cb": told.append})
        try:
            found = consumer.committed(questions, timeout=_OFFSETS_TIMEOUT)
        except KafkaException as error:
            # A refused group looks like a timeout here; why is told only to who polls.
            message = consumer.poll(_SLICE)
            told += [fault for fault in (message.error() if message else None,) if fault is not None]
            cause = next((fault for fault in told if fault.code() in FORBIDDEN), kafka_error(error))
            raise self._classified(cause, f"reading the offsets of group {group}", topic) from error
        finally:
            consumer.close()
        for entry in found:
            if entry.error is not None:
                raise self._classified(entry.error, f"reading the offsets of group {group}", topic)
        return {entry.partition: (entry.offset, entry.metadata or "") for entry in found if entry.offset >= 0}

    def _partitions(self, topic: str) -> int:
        future = self._client.describe_topics(TopicCollection([topic]), request_timeout=_TIMEOUT)[topic]
        try:
            return len(self._result(future, f"asking for the partitions of topic {topic}", topic=topic).partitions)
        except UnknownTopic:
            return 0

    def set_group_offset(self, group: str, topic: str, partition: int, offset: int, *, mark: str) -> bool:
        """Commit the group's offset with `mark`, which its consumer knows as its own; False while it has members."""
        where = TopicPartition(topic, partition, offset, metadata=mark)
        asked = [ConsumerGroupTopicPartitions(group, [where])]
        future = self._client.alter_consumer_group_offsets(asked, request_timeout=_TIMEOUT)[group]
        what = f"setting the offset of group {group}"
        if not self._unless_in_use(future, what):
            return False
        # Refused for the partition, the call still succeeds as a whole.
        error = future.result().topic_partitions[0].error
        if error is not None and error.code() not in _IN_USE:
            raise self._classified(error, what, topic)
        return error is None

    def delete_group(self, group: str) -> bool:
        """Delete the group and its offsets, if it exists; False while it has members."""
        future = self._client.delete_consumer_groups([group], request_timeout=_TIMEOUT)[group]
        return self._unless_in_use(future, f"deleting group {group}", ignore=KafkaError.GROUP_ID_NOT_FOUND)

    def _unless_in_use(self, future: Future[Any], what: str, *, ignore: int | None = None) -> bool:
        try:
            self._result(future, what, ignore=ignore)
        except EoError as error:
            cause = error.__cause__
            if isinstance(cause, KafkaException) and kafka_error(cause).code() in _IN_USE:
                return False
            raise
        return True

    def watermarks(self, topic: str, partition: int) -> tuple[int, int]:
        """The first offset kept and the offset the next record gets. Raises UnknownTopic, NotAuthorized, Retryable."""
        spec: Any = OffsetSpec  # its stubs leave these untyped
        return self._offset(topic, partition, spec.earliest()), self._offset(topic, partition, spec.latest())

    def _offset(self, topic: str, partition: int, spec: Any) -> int:
        try:
            return self._ask_offset(topic, partition, spec)
        except Retryable as trouble:
            _log.debug("%s Asked again, of whoever leads by now.", trouble)
        # The client asks the leader that it remembers, with the epoch that it remembers, until its metadata are old.
        # Seen after each restart of a broker: for minutes FENCED_LEADER_EPOCH, so that no partition could be claimed.
        # Not by the topic's name: where brokers create what is asked for, a deleted one would be back.
        self._look_around()
        # One that is missing or forbidden has no leaders either, and only this question is told why.
        self.ask_topic_id(topic)()
        return self._ask_offset(topic, partition, spec)

    def _ask_offset(self, topic: str, partition: int, spec: Any) -> int:
        where, what = TopicPartition(topic, partition), f"reading the log ends of {topic}[{partition}]"
        future = self._client.list_offsets({where: spec}, request_timeout=_PROBE_TIMEOUT)[where]
        offset = int(self._result(future, what, topic=topic, timeout=_PROBE_TIMEOUT).offset)
        if offset < 0:
            # Seen while a leader died: no error, and no offset. Taken for one, every position is outside the log.
            raise Retryable(f"{what}: Kafka at {self._servers} does not know them now.")
        return offset

    def _await_leaders(self, topic: str, partitions: int) -> None:
        # The controller confirms a topic before every broker knows it; whoever asked for it next saw it missing.
        deadline = clock.monotonic() + _TIMEOUT
        while clock.monotonic() < deadline:
            info = self.existing([topic]).get(topic)
            if info is not None and info.partitions >= partitions:
                return
            clock.sleep(_SLICE)
        raise Retryable(f"topic {topic} was created but does not appear within {_TIMEOUT:g} s.")

    def _ask_cluster(self, timeout: float, stop: threading.Event | None) -> Any:
        future = self._client.describe_cluster(request_timeout=timeout)
        return self._result(future, f"asking Kafka at {self._servers}", stop=stop, timeout=timeout)

    def _result(
        self,
        future: Future[_T],
        what: str,
        *,
        topic: str | None = None,
        ignore: int | None = None,
        stop: threading.Event | None = None,
        timeout: float = _TIMEOUT,
    ) -> Any:
        # The client's own request_timeout is not trusted: a worker that waits for an answer that never comes stands
        # still for ever, and inside a database transaction.
        deadline = clock.monotonic() + timeout + _GRACE
        while not future.done():
            if clock.monotonic() > deadline:
                raise Retryable(f"{what}: no answer from Kafka at {self._servers} within {timeout + _GRACE:g} s.")
            # A refused login is told only to the error callback, which poll serves; the request itself just times out.
            # Waiting in poll itself would always last the whole slice: an answer does not wake it.
            wait([future], timeout=_SLICE)
            self._client.poll(0)
            self._raise_refusal()
            if stop is not None and stop.is_set():
                return None
        try:
            return future.result()
        except KafkaException as error:
            if ignore is not None and kafka_error(error).code() == ignore:
                return None
            if kafka_error(error).code() == KafkaError._TIMED_OUT:
                self._look_around()
            raise self._classified(kafka_error(error), what, topic) from error

    def _look_around(self) -> None:
        # A broker that was frozen says for a moment that there is no controller. The client believes it until it next
        # asks for metadata, minutes later, and every question meanwhile waits for a controller until it times out.
        client = self._client
        try:
            client.list_topics(timeout=_PROBE_TIMEOUT)
        except KafkaException as error:
            _log.debug("Kafka at %s: %s; asked again with the next question.", self._servers, kafka_error(error).str())
            # By a new client: this one may have lost the cluster for good (contact.py). Seen: a handler that could ask
            # for nothing any more, and claimed nothing. Only this one: another thread's questions may be with the next.
            with self._lock:
                if self._client_made is client:
                    self._client_made = None

    def _classified(self, error: KafkaError, what: str, topic: str | None) -> EoError:
        return meaning(error, what, topic=topic, servers=self._servers)

    def _on_error(self, error: KafkaError) -> None:
        # Only remembered: raised here, it would surface in whatever call is polling.
        if error.code() in REFUSED_LOGIN:
            self._refusal = error
        elif error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._trouble = error.str()

    def _raise_refusal(self) -> None:
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            raise NotAuthorized(
                f"Kafka at {self._servers} refuses the login: {refusal.str()}.",
                remedy="Correct EO_KAFKA_SECURITY_PROTOCOL and EO_KAFKA_SASL_*.",
            )


def _uuid(value: Any) -> UUID:
    mask = (1 << 64) - 1
    return UUID(int=(value.get_most_significant_bits() & mask) << 64 | value.get_least_significant_bits() & mask)
