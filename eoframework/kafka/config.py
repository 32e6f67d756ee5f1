"""The configuration of every Kafka client there is: librdkafka's unsafe defaults, made safe.

Whatever is fixed here cannot be overridden (kafka_keys.REASONS); the rest of EO_KAFKA_* is passed on to the clients
that know the key.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from eoframework import clock, kafka_keys
from eoframework.settings import Settings

_CLIENT_LOG = logging.getLogger("eoframework.kafka.client")
_REPEAT_AFTER = 30.0
_ALSO_RAISED = ("TXNERR ", "FATAL ", "ADDPARTS ")
"""librdkafka's names of kinds of log lines."""
_FIGURES = re.compile(r"\d+")

# The quarantine rule takes a call that lasted half of this for one that was re-sent (DESIGN.md, "Non-obvious"). The cap
# must not be lower, or re-sends come earlier than the rule believes.
RETRY_BACKOFF_MS = 100
_RETRY_BACKOFF_MAX_MS = 1000

# A broker that is frozen, or whose machine is gone, closes no connection: its clients notice it by the requests that it
# does not answer, with librdkafka's default after 60 s (a transactional producer: its transaction's timeout), and until
# then do not even ask who leads by now. The cluster gives such a broker's parts to others after 9 s (the brokers'
# broker.session.timeout.ms, by default), so: a second longer. Sooner would find nobody else in charge, and would tear
# good connections at a broker's long pause, or while acks=all waits for the cluster to give up a frozen follower.
# Not limited by it: JoinGroup, which waits for the others (up to max.poll.interval), and fetches wait fetch.wait.max on
# top of it. A call of ours that lasts longer (commit, send_offsets, init: 15 s) has its requests sent again within it,
# to the new coordinator; the quarantine rule sees that by the time it took.
_SOCKET_TIMEOUT_MS = 10_000
# How long a broker waits for its followers before it says so: less, or the client hangs up before it hears of it.
_ACKS_SHARE = 0.9
# What one answer may hold must come through within that time, or the same fetch is tried for ever. librdkafka's own
# pair, 50 MiB in 60 s, needs a line of 7 Mbit/s; so does this one.
_FETCH_BYTES_PER_MS = 52_428_800 // 60_000


def consumer_config(settings: Settings, *, group: str, client_id: str) -> dict[str, Any]:
    """A consumer that commits nothing by itself, never resets its offset and sees committed records only."""
    config = _base(settings, client_id, kafka_keys.CONSUMER)
    if settings.group_protocol == "classic":
        config.setdefault("partition.assignment.strategy", "cooperative-sticky")
    # Not below the largest record: librdkafka refuses that.
    largest = int(config.get("message.max.bytes", 1_000_000))
    config.setdefault("fetch.max.bytes", max(_socket_timeout(config) * _FETCH_BYTES_PER_MS, largest))
    return config | {
        "group.id": group,
        "group.protocol": settings.group_protocol,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        "check.crcs": True,
        "enable.partition.eof": False,
        "allow.auto.create.topics": False,
        "max.poll.interval.ms": _ms(settings.max_poll_interval),
    }


def is_incremental(config: dict[str, Any]) -> bool:
    """Whether a consumer of this configuration is given and loses partitions one by one, and not all of them anew."""
    if config.get("group.protocol") == "consumer":
        return True
    return "cooperative" in str(config.get("partition.assignment.strategy", ""))


def producer_config(settings: Settings, *, client_id: str) -> dict[str, Any]:
    """An idempotent producer: its own retries neither double nor reorder records."""
    config = {"linger.ms": 5} | _base(settings, client_id, kafka_keys.PRODUCER)
    config.setdefault("request.timeout.ms", int(_socket_timeout(config) * _ACKS_SHARE))
    return config | {
        "acks": "all",
        "enable.idempotence": True,
        # librdkafka's default hashes keys with CRC32; this one agrees with the Java client, so that a key has one
        # partition, and one order, whoever writes it.
        "partitioner": "murmur2_random",
        "message.timeout.ms": _ms(settings.transaction_timeout),
    }


def transactional_config(settings: Settings, *, transactional_id: str, client_id: str) -> dict[str, Any]:
    """A producer of Kafka transactions; a second one of the same `transactional_id` fences the first."""
    return _within(
        producer_config(settings, client_id=client_id)
        | {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": _ms(settings.transaction_timeout),
            "retry.backoff.ms": RETRY_BACKOFF_MS,
            "retry.backoff.max.ms": _RETRY_BACKOFF_MAX_MS,
        }
    )


def transform_config(settings: Settings, *, transactional_id: str, client_id: str) -> dict[str, Any]:
    """The same for a transform, whose transactions end before the group would give its partitions to another."""
    # What waits to be sent is bounded in bytes too: the default of 1 GB is what a batch of large outputs would fill.
    bounded = {"queue.buffering.max.kbytes": 65_536}
    config = transactional_config(settings, transactional_id=transactional_id, client_id=client_id)
    return _within(
        bounded
        | config
        | {
            "transaction.timeout.ms": _ms(settings.transform_transaction_timeout),
            "message.timeout.ms": _ms(settings.transform_message_timeout),
        }
    )


def sending_config(settings: Settings, *, client_id: str) -> dict[str, Any]:
    """A `Producer`'s idempotent client: a message does not wait for company, which takes it 0.3 ms instead of 6.

    Many at once find company all the same, while the requests before them are under way.
    """
    chosen = {"linger.ms", "queue.buffering.max.ms"} & settings.kafka.keys()
    linger = {} if chosen else {"linger.ms": 0}
    return producer_config(settings, client_id=client_id) | linger | _compression(settings)


def sending_transaction_config(settings: Settings, *, transactional_id: str) -> dict[str, Any]:
    """A `Producer`'s transactional client."""
    config = transactional_config(settings, transactional_id=transactional_id, client_id=transactional_id)
    return config | _compression(settings)


def _compression(settings: Settings) -> dict[str, Any]:
    # Not for the relay: whether a dead letter still exceeds its topic's limit is told from its size before compression.
    return {} if {"compression.type", "compression.codec"} & settings.kafka.keys() else {"compression.type": "lz4"}


def offset_reader_config(settings: Settings, *, group: str) -> dict[str, Any]:
    """A consumer that never joins its group, only asks for its offsets.

    Classic whatever the members are: under KIP-848 it would ask as a member, which it is not.
    """
    classic = settings.model_copy(update={"group_protocol": "classic"})
    return consumer_config(classic, group=group, client_id="eo-offsets")


def admin_config(settings: Settings) -> dict[str, Any]:
    """A client for questions about topics, groups and offsets; it changes nothing by itself."""
    return _base(settings, "eo-admin", frozenset())


class _Repeats(logging.Filter):
    """Lets one and the same line through every 30 s: a client tells each of its 20 attempts a second to connect."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        # Without its figures: "(after 3ms in state CONNECT)" makes every attempt a line of its own.
        text, now = _FIGURES.sub("", record.getMessage()), clock.monotonic()
        if now - self._last.get(text, -_REPEAT_AFTER) < _REPEAT_AFTER:
            return False
        if len(self._last) > 1000:
            self._last.clear()
        self._last[text] = now
        return True


class _Raised(logging.Filter):
    """Lowers what the client also raises, to whoever called it and says what follows from it.

    A CRITICAL "Fatal error" beside our "nothing is lost" would call for a person where none is needed.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno > logging.INFO and record.getMessage().startswith(_ALSO_RAISED):
            record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
        return True


_CLIENT_LOG.addFilter(_Repeats())
_CLIENT_LOG.addFilter(_Raised())


def _base(settings: Settings, client_id: str, own_keys: frozenset[str]) -> dict[str, Any]:
    # A key of another kind of client would only earn a warning per client.
    accepted = kafka_keys.SHARED | own_keys
    config: dict[str, Any] = {
        "socket.timeout.ms": _SOCKET_TIMEOUT_MS,
        "socket.keepalive.enable": True,
        # Waits between connection attempts grew to 8 s at librdkafka's default of 10 s: long after the broker was back.
        "reconnect.backoff.max.ms": 1000,
        # A cluster whose only broker has just been restarted, or was frozen, says for a moment that it has no brokers.
        # The client then drops its connections and begins again at the bootstrap servers, by default 5 minutes later.
        "metadata.recovery.rebootstrap.trigger.ms": 3000,
    }
    config |= {key: value for key, value in settings.kafka.items() if key in accepted}
    return config | {
        "bootstrap.servers": settings.require_bootstrap_servers(),
        "client.id": client_id,
        "logger": _CLIENT_LOG,
    }


def _within(config: dict[str, Any]) -> dict[str, Any]:
    """The same with requests that end before their Kafka transaction does: librdkafka refuses a longer patience."""
    limit = int(config["transaction.timeout.ms"])
    return config | {"socket.timeout.ms": min(_socket_timeout(config), limit)}


def _socket_timeout(config: dict[str, Any]) -> int:
    return int(config["socket.timeout.ms"])


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
