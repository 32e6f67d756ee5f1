"""Runs that end (`--once`): what of the topic is not theirs, and whether it is read too.

Under KIP-848 a member that comes gets its share at once, while what a killed one had stays with the dead until its
session ends. A run that took its own share for everything would end with the other half unread, and exit code 0.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

from eoframework import clock
from eoframework.errors import NotFound, Retryable
from eoframework.kafka.admin import Admin
from eoframework.kafka.consumer import GroupConsumer
from eoframework.kafka.ranges import RangeReader
from eoframework.settings import Settings

log = logging.getLogger(__name__)

_PAUSE = 0.5
_STANDS_STILL = 60.0
"""More than Kafka's session timeout, 45 s by default: the dead are buried by then."""


class Rest:
    """The partitions of one group that others have, or nobody yet."""

    def __init__(self, settings: Settings, admin: Admin, *, group: str, topic: str) -> None:
        """Asks nothing yet."""
        self._settings, self._admin, self._group, self._topic = settings, admin, group, topic
        self._ask_at = 0.0
        self._left: dict[int, int] = {}
        self._since = clock.monotonic()

    def is_all_read(self, consumer: GroupConsumer, ours: Collection[int], *, but: Collection[int]) -> bool:
        """Whether `ours` are read to their ends, `but` for those that stand still, and so is what others have.

        Or whoever has that does not go on for a minute. Asked more often than twice a second it says no.
        """
        mine = set(ours)
        done = bool(mine) and consumer.read_to_the_end(mine.difference(but), self._admin.watermarks)
        return done and self._others_are_done(mine)

    def _others_are_done(self, ours: set[int]) -> bool:
        now = clock.monotonic()
        if now < self._ask_at:
            return False
        self._ask_at = now + _PAUSE
        try:
            left = dict(self._unread(ours))
        except (Retryable, NotFound) as trouble:
            log.info("%s: %s Whether others have read their part is asked again", self._topic, trouble)
            return False
        if left != self._left:
            self._left, self._since = left, now
        if left and now > self._since + _STANDS_STILL:
            log.warning(
                "%s: partitions %s are another member's of %s, which has not gone on for %.0f s; this run ends without "
                "them, nothing is lost",
                *(self._topic, ", ".join(map(str, left)), self._group, _STANDS_STILL),
            )
            return True
        return not left

    def _unread(self, ours: set[int]) -> Iterator[tuple[int, int]]:
        """The others' partitions in which records wait, and where the group stands in them."""
        found = self._admin.describe(self._topic, settings_optional=True).partitions
        others = sorted(set(range(found)) - ours)
        if not others:
            return
        offsets = self._admin.group_offsets(self._group, self._topic, stable=False)
        with RangeReader(self._settings, self._topic, group=self._group) as reader:
            for partition in others:
                first, end = reader.edges(partition)
                stands = max(first, offsets.get(partition, (first, ""))[0])
                # Not `stands < end`: transaction markers at the end are no records, and nobody passes them.
                if next(reader.read(partition, stands, end, limit=1), None):
                    yield partition, stands
