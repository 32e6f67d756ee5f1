"""A header name that is not UTF-8: Kafka takes any bytes, only the Python client does not, so librdkafka is asked."""

from __future__ import annotations

import ctypes
from pathlib import Path

import confluent_kafka

# rd_kafka_vtype_t of librdkafka's rdkafka.h
_END, _TOPIC, _VALUE, _MSGFLAGS, _HEADERS = 0, 1, 4, 7, 10
_COPY = 2


def produce_with_header_name(bootstrap_servers: str, topic: str, value: bytes, name: bytes) -> None:
    """One message with one header of that name, acknowledged."""
    library = _librdkafka()
    error = ctypes.create_string_buffer(512)
    config = ctypes.c_void_p(library.rd_kafka_conf_new())
    assert library.rd_kafka_conf_set(config, b"bootstrap.servers", bootstrap_servers.encode(), error, 512) == 0
    producer = ctypes.c_void_p(library.rd_kafka_new(0, config, error, 512))
    headers = ctypes.c_void_p(library.rd_kafka_headers_new(ctypes.c_size_t(1)))
    library.rd_kafka_header_add(headers, name, ctypes.c_ssize_t(len(name)), b"v", ctypes.c_ssize_t(1))
    parts = [(_TOPIC, topic.encode()), (_MSGFLAGS, ctypes.c_int(_COPY)), (_VALUE, value, ctypes.c_size_t(len(value)))]
    arguments = [
        argument for kind, *values in (*parts, (_HEADERS, headers)) for argument in (ctypes.c_int(kind), *values)
    ]
    assert library.rd_kafka_producev(producer, *arguments, ctypes.c_int(_END)) == 0
    assert library.rd_kafka_flush(producer, 10_000) == 0
    library.rd_kafka_destroy(producer)


def _librdkafka() -> ctypes.CDLL:
    package = Path(confluent_kafka.__file__).parent
    bundled = sorted((package.parent / "confluent_kafka.libs").glob("librdkafka*"))
    library = ctypes.CDLL(str(bundled[0]) if bundled else "librdkafka.so.1")
    for function in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_headers_new"):
        getattr(library, function).restype = ctypes.c_void_p
    return library
