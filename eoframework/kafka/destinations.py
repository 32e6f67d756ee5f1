"""What a producer knows of the topics it sends to, asked once before the first message of each."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass

from eoframework import clock
from eoframework.errors import Retryable, Unreachable
from eoframework.kafka.admin import Admin, TopicInfo
from eoframework.settings import Settings

_log = logging.getLogger(__name__)

_PAUSE = 0.1
_CLIENT_LIMIT = 1_000_000


@dataclass(slots=True, eq=False)
class Destination:
    """A topic that was there when it was asked about."""

    topic: str
    client_limit: int
    """Bytes of a message that the client takes (message.max.bytes)."""
    limit: int | None
    """Bytes of a request that the topic takes (max.message.bytes); None where that may not be read."""
    compacted: bool
    """Whether a record may vanish because a later one has its key; True where that may not be read."""
    doubted: bool = False
    """Kafka refused something here; ask again."""


class Destinations:
    """The topics of one producer; thread-safe.

    Asked before anything is produced: the client holds the messages of an unknown topic for 30 s, and would have a
    broker that creates topics in passing make it, with the default of one replica.
    """

    def __init__(self, settings: Settings) -> None:
        self._admin = Admin(settings)
        self._client_limit = int(settings.kafka.get("message.max.bytes", _CLIENT_LIMIT))
        self._lock = threading.Lock()
        self._known: dict[str, Destination] = {}
        self._warned: set[str] = set()

    def look(self, topic: str, *, deadline: float) -> Destination:
        """The topic, waited for until `deadline` (clock.monotonic()) while Kafka is away.

        Raises UnknownTopic, NotAuthorized, Retryable: nothing was sent.
        """
        known = self._known.get(topic)
        if known is not None and not known.doubted:
            return known
        # Under the lock: a hundred threads that send their first message at once ask one question.
        with self._lock:
            known = self._known.get(topic)
            if known is None or known.doubted:
                known = self._destination(self._ask(topic, deadline))
                self._known[topic] = known
            return known

    def _ask(self, topic: str, deadline: float) -> TopicInfo:
        while True:
            try:
                # First, since it notices within 3 s that nobody answers.
                self._admin.wait_until_reachable(wait=False)
                return self._admin.describe(topic, settings_optional=True)
            except (Retryable, Unreachable) as error:
                if clock.monotonic() >= deadline:
                    raise Retryable(f"{topic}: nothing was sent: {error.what}", remedy=error.remedy) from error
            clock.sleep(_PAUSE)

    def _destination(self, info: TopicInfo) -> Destination:
        if info.name not in self._warned:
            self._warned.add(info.name)
            _warn_of_weakness(info)
        limit = info.config.get("max.message.bytes")
        return Destination(
            topic=info.name,
            client_limit=self._client_limit,
            limit=None if limit is None else int(limit),
            compacted="compact" in info.config.get("cleanup.policy", "compact"),
        )


def _warn_of_weakness(info: TopicInfo) -> None:
    if info.replicas == 1:
        _log.warning(
            "topic %s has one replica: what Kafka confirms is on one broker only, and lost with its disk.", info.name
        )
    elif info.config.get("min.insync.replicas") == "1":
        _log.warning(
            "topic %s has %d replicas and min.insync.replicas=1: while the others are behind, Kafka confirms what only "
            "the leader holds, and that is lost with it. Set min.insync.replicas=2.",
            info.name,
            info.replicas,
        )
