"""librdkafka's own mock cluster, by ctypes: brokers inside this process that answer what they are told to answer.

Used for one thing: what the *client* makes of an answer. It does not fence an old epoch, does not keep uncommitted
records from read_committed readers and drops the offsets of a transaction; nothing about Kafka's side of exactly-once
processing can be learnt from it, and nothing of that is tested with it.

The library is the one that confluent_kafka has loaded: what is tested is what runs. Its mock API is marked as
experimental (rdkafka_mock.h), so a missing symbol is an error here, not a skipped test.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from enum import IntEnum
from functools import cache
from pathlib import Path
from types import TracebackType

import confluent_kafka

_PRODUCER = 0
DROP = -195
"""RD_KAFKA_RESP_ERR__TRANSPORT: the broker hangs up instead of doing what it is asked."""


class Api(IntEnum):
    """Requests of Kafka's protocol."""

    PRODUCE = 0
    METADATA = 3
    OFFSET_COMMIT = 8
    OFFSET_FETCH = 9
    FIND_COORDINATOR = 10
    INIT_PRODUCER_ID = 22
    ADD_PARTITIONS_TO_TXN = 24
    ADD_OFFSETS_TO_TXN = 25
    END_TXN = 26
    TXN_OFFSET_COMMIT = 28


class MockCluster:
    """Some brokers on local ports, for one test: a client of an earlier test can take nothing that is meant for it."""

    def __init__(self, *, brokers: int = 1) -> None:
        self._lib = _library()
        self._brokers = brokers
        self._host = _host(self._lib)
        self._cluster = self._lib.rd_kafka_mock_cluster_new(self._host, brokers)
        if not self._cluster:
            raise RuntimeError("librdkafka makes no mock cluster")
        self.bootstrap_servers: str = self._lib.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        self._lib.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, 0)
        self._lib.rd_kafka_mock_start_request_tracking(self._cluster)

    def __enter__(self) -> MockCluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Hang up on everybody."""
        cluster, self._cluster = self._cluster, None
        if cluster:
            self._lib.rd_kafka_mock_cluster_destroy(cluster)
            self._lib.rd_kafka_destroy(self._host)

    def create_topic(self, topic: str, *, partitions: int = 1) -> None:
        """As an administrator would."""
        self._check(self._lib.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, 1))

    def answer(self, api: Api, error: int, *, times: int) -> None:
        """The next requests of this kind get this error, whatever number it is, or are hung up on with DROP."""
        errors = (ctypes.c_int * times)(*[error] * times)
        self._lib.rd_kafka_mock_push_request_errors_array(self._cluster, api, times, errors)

    def answer_late(self, api: Api, *, times: int, delay_ms: int) -> None:
        """The next requests of this kind are done at once and answered so much later; `forget` does not undo it."""
        for broker in range(1, self._brokers + 1):
            for _ in range(times):
                push = self._lib.rd_kafka_mock_broker_push_request_error_rtts
                self._check(push(self._cluster, broker, api, 1, 0, delay_ms))

    def forget(self, api: Api) -> None:
        """Requests of this kind are done and answered again."""
        self._lib.rd_kafka_mock_clear_request_errors(self._cluster, api)

    def requests(self) -> Counter[int]:
        """How often each kind of request has come in, read off the wire."""
        count = ctypes.c_size_t()
        found = self._lib.rd_kafka_mock_get_requests(self._cluster, ctypes.byref(count))
        try:
            return Counter(self._lib.rd_kafka_mock_request_api_key(found[at]) for at in range(count.value))
        finally:
            if count.value:
                self._lib.rd_kafka_mock_request_destroy_array(found, count.value)

    def set_coordinator(self, kind: str, key: str, broker: int) -> None:
        """Another broker coordinates a "transaction" or a "group" from now on."""
        self._check(self._lib.rd_kafka_mock_coordinator_set(self._cluster, kind.encode(), key.encode(), broker))

    def set_down(self, broker: int) -> None:
        """A broker hangs up on everybody and takes no connection; its parts stay its own."""
        self._check(self._lib.rd_kafka_mock_broker_set_down(self._cluster, broker))

    def set_up(self, broker: int) -> None:
        """It takes connections again."""
        self._check(self._lib.rd_kafka_mock_broker_set_up(self._cluster, broker))

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"librdkafka's mock cluster refuses: error {code}")


@cache
def _library() -> ctypes.CDLL:
    """librdkafka as confluent_kafka has loaded it; a second copy would have nothing to do with the one under test."""
    assert confluent_kafka.libversion()
    mapped = Path("/proc/self/maps").read_text().splitlines()
    paths = sorted({line.split(maxsplit=5)[5] for line in mapped if "librdkafka" in line})
    if len(paths) != 1:
        raise RuntimeError(f"one librdkafka was expected to be loaded, found {paths}")
    lib = ctypes.CDLL(paths[0])
    handle, name, number, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t
    short, several = ctypes.c_int16, ctypes.POINTER(ctypes.c_void_p)
    for function, result, arguments in (
        ("rd_kafka_conf_new", handle, []),
        ("rd_kafka_conf_set", number, [handle, name, name, name, size]),
        ("rd_kafka_new", handle, [number, handle, name, size]),
        ("rd_kafka_destroy", None, [handle]),
        ("rd_kafka_mock_cluster_new", handle, [handle, number]),
        ("rd_kafka_mock_cluster_destroy", None, [handle]),
        ("rd_kafka_mock_cluster_bootstraps", name, [handle]),
        ("rd_kafka_mock_group_initial_rebalance_delay_ms", None, [handle, ctypes.c_int32]),
        ("rd_kafka_mock_start_request_tracking", None, [handle]),
        ("rd_kafka_mock_topic_create", number, [handle, name, number, number]),
        ("rd_kafka_mock_push_request_errors_array", None, [handle, short, size, ctypes.POINTER(number)]),
        # Variadic, called with one pair.
        ("rd_kafka_mock_broker_push_request_error_rtts", number, [handle, ctypes.c_int32, short, size, number, number]),
        ("rd_kafka_mock_clear_request_errors", None, [handle, short]),
        ("rd_kafka_mock_get_requests", several, [handle, ctypes.POINTER(size)]),
        ("rd_kafka_mock_request_api_key", short, [handle]),
        ("rd_kafka_mock_request_destroy_array", None, [several, size]),
        ("rd_kafka_mock_coordinator_set", number, [handle, name, name, ctypes.c_int32]),
        ("rd_kafka_mock_broker_set_down", number, [handle, ctypes.c_int32]),
        ("rd_kafka_mock_broker_set_up", number, [handle, ctypes.c_int32]),
    ):
        symbol = getattr(lib, function)
        symbol.restype, symbol.argtypes = result, arguments
    return lib


def _host(lib: ctypes.CDLL) -> int:
    """A client that the mock cluster keeps its books with; it is connected to nothing."""
    reason = ctypes.create_string_buffer(512)
    config = lib.rd_kafka_conf_new()
    # It would warn that it knows no broker.
    lib.rd_kafka_conf_set(config, b"log_level", b"0", reason, len(reason))
    host = lib.rd_kafka_new(_PRODUCER, config, reason, len(reason))
    if not host:
        raise RuntimeError(f"librdkafka makes no client: {reason.value.decode()}")
    return int(host)
