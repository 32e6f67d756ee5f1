"""One cell of the table of client errors: one answer, one to three times, to one request of one of our calls."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from confluent_kafka import KafkaError

from eoframework import clock
from eoframework.errors import EoError, Retryable
from eoframework.kafka.config import consumer_config, producer_config, transactional_config
from eoframework.kafka.consumer import GroupConsumer
from eoframework.kafka.membership import Membership
from eoframework.kafka.producer import IdempotentProducer, Outgoing, Rejected
from eoframework.kafka.transaction import TransactionalProducer
from eoframework.settings import Settings
from tests.campaign.mock_cluster import DROP, Api, MockCluster

SOURCE, TOPIC = "in", "out"
RECORDS = 2
SESSION_MS = 300_000
_SOCKET_MS = 500
_IN_THE_END = 40.0
# The client looks for requests whose time is over once a second.
_LATE_MS = 1800

UNKNOWN_TO_THE_CLIENT = 999
"""A code of a Kafka that is newer than the client."""
LATE = "LATE"
"""Done, and answered after the client has given up waiting for it."""

_CODES = """
    UNKNOWN UNKNOWN_TOPIC_OR_PART LEADER_NOT_AVAILABLE NOT_LEADER_FOR_PARTITION REQUEST_TIMED_OUT
    BROKER_NOT_AVAILABLE MSG_SIZE_TOO_LARGE NETWORK_EXCEPTION COORDINATOR_LOAD_IN_PROGRESS
    COORDINATOR_NOT_AVAILABLE NOT_COORDINATOR RECORD_LIST_TOO_LARGE NOT_ENOUGH_REPLICAS
    NOT_ENOUGH_REPLICAS_AFTER_APPEND ILLEGAL_GENERATION UNKNOWN_MEMBER_ID REBALANCE_IN_PROGRESS
    TOPIC_AUTHORIZATION_FAILED GROUP_AUTHORIZATION_FAILED CLUSTER_AUTHORIZATION_FAILED UNSUPPORTED_VERSION
    INVALID_REQUEST UNSUPPORTED_FOR_MESSAGE_FORMAT POLICY_VIOLATION OUT_OF_ORDER_SEQUENCE_NUMBER
    DUPLICATE_SEQUENCE_NUMBER INVALID_PRODUCER_EPOCH INVALID_TXN_STATE INVALID_PRODUCER_ID_MAPPING
    INVALID_TRANSACTION_TIMEOUT CONCURRENT_TRANSACTIONS TRANSACTION_COORDINATOR_FENCED
    TRANSACTIONAL_ID_AUTHORIZATION_FAILED OPERATION_NOT_ATTEMPTED KAFKA_STORAGE_ERROR UNKNOWN_PRODUCER_ID
    FENCED_INSTANCE_ID INVALID_RECORD UNSTABLE_OFFSET_COMMIT THROTTLING_QUOTA_EXCEEDED PRODUCER_FENCED
"""
FAULTS: dict[str, int | None] = {
    **{name: getattr(KafkaError, name) for name in _CODES.split()},
    "STALE_MEMBER_EPOCH": 113,
    "TRANSACTION_ABORTABLE": 120,
    "NOT_KNOWN_TO_THE_CLIENT": UNKNOWN_TO_THE_CLIENT,
    "DROP": DROP,
    LATE: None,
}
TIMES = (1, 2, 3)


@dataclass(frozen=True, order=True)
class Call:
    """`steps` are taken in order; just before `at` the answer to `api` is set."""

    name: str
    api: Api
    at: str
    steps: tuple[str, ...]
    first: Api | None = None
    """Answered NOT_COORDINATOR once, or the client would not ask for `api` at this point."""


_SENT = ("make_ready", "begin", "send", "flush")
_MOVED = (*_SENT, "offsets")
CALLS = (
    Call("init", Api.FIND_COORDINATOR, "make_ready", (*_SENT, "commit")),
    Call("init", Api.INIT_PRODUCER_ID, "make_ready", (*_SENT, "commit")),
    Call("send", Api.METADATA, "send", (*_SENT, "commit")),
    Call("send", Api.ADD_PARTITIONS_TO_TXN, "send", (*_SENT, "commit")),
    Call("send", Api.PRODUCE, "send", (*_SENT, "commit")),
    Call("offsets", Api.ADD_OFFSETS_TO_TXN, "offsets", (*_MOVED, "commit")),
    Call("offsets", Api.FIND_COORDINATOR, "offsets", (*_MOVED, "commit")),
    Call("offsets", Api.TXN_OFFSET_COMMIT, "offsets", (*_MOVED, "commit")),
    Call("commit", Api.END_TXN, "commit", (*_SENT, "commit")),
    Call("commit", Api.FIND_COORDINATOR, "commit", (*_SENT, "commit"), first=Api.END_TXN),
    Call("commit_moved", Api.END_TXN, "commit", (*_MOVED, "commit")),
    Call("abort", Api.END_TXN, "abort", (*_SENT, "abort")),
    Call("abort", Api.FIND_COORDINATOR, "abort", (*_SENT, "abort"), first=Api.END_TXN),
    Call("abort_unsent", Api.ADD_PARTITIONS_TO_TXN, "send", ("make_ready", "begin", "send", "settle", "abort")),
    Call("idempotent", Api.INIT_PRODUCER_ID, "make_ready", ("make_ready", "begin", "send", "commit")),
    Call("idempotent", Api.PRODUCE, "send", ("make_ready", "begin", "send", "commit")),
    Call("group_committed", Api.OFFSET_FETCH, "committed", ("join", "committed")),
    Call("group_mark", Api.OFFSET_COMMIT, "mark", ("join", "mark")),
    Call("group_commit", Api.OFFSET_COMMIT, "commit", ("join", "commit")),
)
AFTERWARDS = {
    "idempotent": ("make_ready", "begin", "send", "commit"),
    # A member that was thrown out has to be taken in again, and a late answer may still be under way.
    "group_committed": ("committed_in_the_end",),
    "group_mark": ("marked_in_the_end",),
    "group_commit": ("marked_in_the_end",),
}
_TRANSACTION = (*_MOVED, "commit")


@dataclass(frozen=True, order=True)
class Cell:
    """What is injected where."""

    call: Call
    fault: str
    times: int

    def __str__(self) -> str:
        return f"{self.call.name} {self.call.api.name} {self.fault} x{self.times}"


@dataclass
class Seen:
    """What became of it."""

    outcome: str = "none"
    at: str = ""
    """The step that raised."""
    committed: bool = False
    doubted: bool = False
    """Whether the client was to be replaced already before its caller aborted."""
    replaced: bool = False
    """Whether the next transaction was made by another client."""
    found_fenced: bool = False
    next: str = "ok"
    why: str = ""
    """The error's text, or why the producer was doubted."""
    seconds: dict[str, float] = field(default_factory=dict)
    asked: int = 0
    """Requests of the kind that was injected into, until the transaction was over or our class raised."""
    endings: int = 0
    """EndTxn requests in the same time."""
    produced: int = 0
    """Produce requests in the same time."""


def cells() -> Iterator[Cell]:
    """The table's, in its order."""
    return (Cell(call, fault, times) for call in CALLS for fault in FAULTS for times in TIMES)


def run(cell: Cell) -> Seen:
    """Inject, go on as our callers do, and look at the wire. Raises nothing that a client error can cause."""
    with MockCluster() as cluster:
        for topic in (TOPIC, SOURCE):
            cluster.create_topic(topic)
        return _Run(cell, cluster).result()


def inject(cluster: MockCluster, api: Api, fault: str, times: int) -> None:
    """Set the answers."""
    error = FAULTS[fault]
    if error is None:
        cluster.answer_late(api, times=times, delay_ms=_LATE_MS)
    else:
        cluster.answer(api, error, times=times)


class _Run:
    def __init__(self, cell: Cell, cluster: MockCluster) -> None:
        self._cell, self._cluster = cell, cluster
        self._actor = _actor(cell, cluster)
        self._seen = Seen()

    def result(self) -> Seen:
        seen, actor, call = self._seen, self._actor, self._cell.call
        armed = self._transaction()
        before = actor.client()
        asked = self._cluster.requests() - armed
        seen.asked, seen.endings, seen.produced = asked[call.api], asked[Api.END_TXN], asked[Api.PRODUCE]
        seen.doubted = bool(actor.doubt())
        if seen.outcome != "none":
            # As every caller does.
            self._step("give_up")
        seen.why = seen.why or actor.doubt()
        seen.found_fenced = actor.found_fenced()
        self._cluster.forget(call.api)
        if call.first is not None:
            self._cluster.forget(call.first)
        outcome = self._take(AFTERWARDS.get(call.name, _TRANSACTION), "next ")
        seen.next = outcome or "ok"
        seen.replaced = actor.client() is not before
        actor.close()
        return seen

    def _transaction(self) -> Counter[int]:
        seen, call = self._seen, self._cell.call
        before = call.steps.index(call.at)
        failed = self._take(call.steps[:before], "")
        assert failed is None, f"{self._cell}: failed before anything was injected: {failed} {seen.why}"
        armed = self._cluster.requests()
        if call.first is not None:
            inject(self._cluster, call.first, "NOT_COORDINATOR", 1)
        inject(self._cluster, call.api, self._cell.fault, self._cell.times)
        failed = self._take(call.steps[before:], "")
        seen.outcome = failed or "none"
        seen.committed = failed is None and call.steps[-1] == "commit"
        return armed

    def _take(self, steps: tuple[str, ...], prefix: str) -> str | None:
        """The kind of error of the first step that fails."""
        for step in steps:
            failed = self._step(step, prefix)
            if failed is not None:
                self._seen.at = self._seen.at or f"{prefix}{step}"
                return failed
        return None

    def _step(self, step: str, prefix: str = "") -> str | None:
        started = clock.monotonic()
        try:
            self._actor.steps[step]()
        except Exception as error:  # noqa: BLE001 - what comes out is what is asked
            self._seen.why = self._seen.why or str(error)
            return _kind(error)
        finally:
            self._seen.seconds[prefix + step] = clock.monotonic() - started
        return None


def _kind(error: Exception) -> str:
    if isinstance(error, Rejected) and error.topic_trouble:
        return "Rejected(topic)"
    return type(error).__name__ if isinstance(error, EoError) else f"UNCLASSIFIED {error!r}"


# --- our classes, by the names of their calls ---


class _Actor:
    steps: dict[str, Callable[[], object]]

    def client(self) -> object:
        """Changes when the client is another one."""
        return None

    def doubt(self) -> str:
        return ""

    def found_fenced(self) -> bool:
        return False

    def close(self) -> None:
        """The end of the cell."""


def _actor(cell: Cell, cluster: MockCluster) -> _Actor:
    # As in production but for the patience: with 10 s of it a late answer would cost a cell half a minute.
    kafka = {"socket.timeout.ms": str(_SOCKET_MS), "reconnect.backoff.ms": "10", "linger.ms": "0"}
    if cell.call.name.startswith("group_"):
        # One that is told that it is no member comes back as another one, and waits until the mock forgets the first.
        # All others stay members, however long the client looks for the coordinator.
        session = 6_000 if cell.fault in {"UNKNOWN_MEMBER_ID", "ILLEGAL_GENERATION"} else SESSION_MS
        kafka |= {"session.timeout.ms": str(session), "heartbeat.interval.ms": "500"}
    settings = Settings.load(
        database_url=None, kafka_bootstrap_servers=cluster.bootstrap_servers, kafka=kafka, group_protocol="classic"
    )
    if cell.call.name == "idempotent":
        return _Idempotent(settings)
    if cell.call.name.startswith("group_"):
        return _Group(settings)
    return _Transactional(settings, cluster)


def _records() -> list[Outgoing]:
    return [Outgoing(TOPIC, b"key", b"value", [], partition=0)] * RECORDS


class _Transactional(_Actor):
    def __init__(self, settings: Settings, cluster: MockCluster) -> None:
        config = transactional_config(settings, transactional_id="eo.relay.table", client_id="table")
        self._producer = producer = TransactionalProducer(config)
        self._cluster = cluster
        member = Membership.read(b"CGMDv2:" + struct.pack("<i", 1) + b"group\0member\0\1")
        self.steps = {
            "make_ready": producer.make_ready,
            "begin": producer.begin,
            "send": lambda: producer.send(_records()),
            "flush": producer.flush,
            "offsets": lambda: producer.send_offsets(SOURCE, {0: (7, "eo:1")}, member),
            "commit": producer.commit,
            "abort": producer.abort,
            "give_up": producer.abort,
            "settle": self._wait_until_asked,
        }

    def _wait_until_asked(self) -> None:
        """The client sends on its own threads; here its first request must be under way when it is aborted."""
        deadline = clock.monotonic() + 5
        while not self._cluster.requests()[Api.ADD_PARTITIONS_TO_TXN]:
            assert clock.monotonic() < deadline, "no partition was added to the transaction"
            clock.sleep(0.001)

    def client(self) -> object:
        return self._producer._producer

    def doubt(self) -> str:
        return self._producer._doubt

    def found_fenced(self) -> bool:
        return self._producer.found_fenced

    def close(self) -> None:
        self._producer.close()


class _Idempotent(_Actor):
    def __init__(self, settings: Settings) -> None:
        config = producer_config(settings, client_id="table")
        self._producer = producer = IdempotentProducer(config, stopping=lambda: False)
        self.steps = {
            "make_ready": producer.make_ready,
            "begin": producer.begin,
            "send": lambda: producer.send(_records()),
            "commit": producer.commit,
            "give_up": producer.abort,
        }

    def client(self) -> object:
        return self._producer._producer

    def close(self) -> None:
        self._producer.close()


class _Group(_Actor):
    def __init__(self, settings: Settings) -> None:
        config = consumer_config(settings, group="group", client_id="table")
        self._joined = False
        self._consumer = GroupConsumer(config, TOPIC, on_assigned=self._assigned, on_revoked=lambda _: None)
        self.steps = {
            "join": self._join,
            "committed": self._committed,
            "mark": self._mark,
            "committed_in_the_end": lambda: self._in_the_end(self._committed),
            "marked_in_the_end": lambda: self._in_the_end(self._mark),
            "commit": lambda: self._consumer.commit({0: (0, 1)}, wait=True),
            "give_up": lambda: None,
        }

    def _assigned(self, partitions: list[int]) -> dict[int, int | None]:
        self._joined = True
        return dict.fromkeys(partitions, 0)

    def _committed(self) -> None:
        self._consumer.committed([0], timeout=5.0)

    def _mark(self) -> None:
        self._consumer.mark(0, 0, 1)

    def _in_the_end(self, call: Callable[[], None]) -> None:
        deadline = clock.monotonic() + _IN_THE_END
        while True:
            try:
                return call()
            except Retryable:
                if clock.monotonic() > deadline:
                    raise
            # Each commit of one that is no member has the client begin its joining anew.
            self._consumer.fetch(1, 0.05)
            while not self._consumer.assigned() and clock.monotonic() < deadline:
                self._consumer.fetch(1, 0.05)

    def _join(self) -> None:
        deadline = clock.monotonic() + 10
        while not self._joined:
            assert clock.monotonic() < deadline, "the member was not taken into the group"
            self._consumer.fetch(1, 0.05)

    def close(self) -> None:
        self._consumer.close({})
