"""What the relay knows of the topics it writes to: their limits, and which of them do not take anything now."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from eoframework import clock, events
from eoframework.errors import EoError, Retryable
from eoframework.kafka.admin import Admin

_log = logging.getLogger(__name__)

_ASK_AGAIN = 3.0
_TRUST_FOR = 30.0
_DEFAULT_LIMIT = 1_048_588


@dataclass(slots=True)
class _Topic:
    limit: int
    until: float
    refusal: str = ""


class Topics:
    """One per relay process, shared by its shards' threads.

    Asked before anything is produced: a producer waits up to 30 s for an unknown topic, and all of its batch with it.
    A missing or forbidden topic is a state of the cluster that a person mends, so its rows wait and the others flow.
    """

    def __init__(self, admin: Admin) -> None:
        self._admin = admin
        self._lock = threading.Lock()
        self._known: dict[str, _Topic] = {}

    def limit(self, topic: str) -> int | None:
        """The largest request the topic takes, in bytes; None while it takes nothing. Raises Retryable."""
        with self._lock:
            known = self._known.get(topic)
        if known is not None and known.until > clock.monotonic():
            return None if known.refusal else known.limit
        try:
            info = self._admin.describe(topic, settings_optional=True)
        except Retryable:
            raise
        except EoError as error:
            self.pause(topic, str(error))
            return None
        limit = int(info.config.get("max.message.bytes", _DEFAULT_LIMIT))
        with self._lock:
            self._known[topic] = _Topic(limit, clock.monotonic() + _TRUST_FOR)
        if known is not None and known.refusal:
            _log.info("topic %s is asked again; its outbox rows go on.", topic)
        return limit

    def pause(self, topic: str, why: str) -> None:
        """Leave the topic's rows where they are for a few seconds."""
        with self._lock:
            known = self._known.get(topic)
            news = known is None or not known.refusal
            self._known[topic] = _Topic(_DEFAULT_LIMIT, clock.monotonic() + _ASK_AGAIN, why)
        if news:
            _log.error(
                "topic %s takes nothing: %s Its outbox rows wait, asked again every %g s; other topics flow.",
                topic,
                why,
                _ASK_AGAIN,
            )
            events.emit("relay.topic_paused", topic=topic, why=why)

    def paused(self) -> list[str]:
        """The topics whose rows are to be left where they are now."""
        now = clock.monotonic()
        with self._lock:
            return [name for name, known in self._known.items() if known.refusal and known.until > now]
