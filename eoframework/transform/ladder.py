"""The timeouts of a transform, each of which must end what it guards before the next one acts.

message < transaction < session <= max.poll.interval: a record fails before its transaction does; the transaction of a
dead worker is over when the group gives its partitions away, so the successor finds settled offsets; and a worker that
lives is not given up for a long batch sooner than a dead one.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Protocol

from eoframework.errors import ConfigurationError
from eoframework.settings import Settings

log = logging.getLogger(__name__)

_CLASSIC_SESSION = 45.0
"""librdkafka's default of session.timeout.ms, in seconds."""
_BROKERS_SESSION = "group.consumer.session.timeout.ms"


class Cluster(Protocol):
    """What is asked of Kafka."""

    def broker_config(self, name: str) -> str | None: ...


def check_ladder(settings: Settings, cluster: Cluster) -> None:
    """Raise ConfigurationError that names every violated rung and what to set."""
    session, spelt = _session(settings, cluster)
    rungs = [
        ("EO_TRANSFORM_MESSAGE_TIMEOUT", settings.transform_message_timeout),
        ("EO_TRANSFORM_TRANSACTION_TIMEOUT", settings.transform_transaction_timeout),
        (spelt, session),
        ("EO_MAX_POLL_INTERVAL", settings.max_poll_interval),
    ]
    known = [(name, seconds) for name, seconds in rungs if seconds is not None]
    broken = []
    for (lower, low), (upper, high) in pairwise(known):
        last = upper == "EO_MAX_POLL_INTERVAL" and lower == spelt
        if low > high or (low == high and not last):
            broken.append(f"{lower} ({low:g} s) must {'not be above' if last else 'be below'} {upper} ({high:g} s)")
    if broken:
        raise ConfigurationError(
            f"the timeouts of transforms contradict each other: {'; '.join(broken)}.",
            remedy="Lower the first or raise the second of each: a worker that died would block its successor, or a "
            "worker that lives would be given up in the middle of a transaction.",
        )


def _session(settings: Settings, cluster: Cluster) -> tuple[float | None, str]:
    if settings.group_protocol == "classic":
        told = settings.kafka.get("session.timeout.ms")
        return (float(told) / 1000 if told else _CLASSIC_SESSION), "EO_KAFKA_SESSION_TIMEOUT_MS"
    told = cluster.broker_config(_BROKERS_SESSION)
    if told is None:
        log.warning(
            "may not read the brokers' %s: that it is above EO_TRANSFORM_TRANSACTION_TIMEOUT is not verified; below "
            "it, successors of a dead worker wait for its transaction to end. Grant DESCRIBE_CONFIGS on the cluster.",
            _BROKERS_SESSION,
        )
        return None, _BROKERS_SESSION
    return float(told) / 1000, f"the brokers' {_BROKERS_SESSION}"
