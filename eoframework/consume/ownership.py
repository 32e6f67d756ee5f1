"""Which partitions this worker may move on: claims in PostgreSQL, one per assigned partition.

The group's assignment says who should own a partition; the claim says who does. A partition that is assigned but not
claimed (the database was away, or somebody else claimed it) stays paused and is claimed again from the worker's loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Protocol
from uuid import UUID

from eoframework import clock, events
from eoframework.consume.start import GroupOffsets, refuse_moved_offset, set_back
from eoframework.db.position import Claim, Positions, Stream
from eoframework.db.session import Connection
from eoframework.db.unit_of_work import WorkerConnection
from eoframework.errors import Conflict, Retryable
from eoframework.kafka.offsets import epoch_of_mark, offset_out_of_range
from eoframework.kafka.same_topic import ask_same_topic

log = logging.getLogger(__name__)


class Cluster(Protocol):
    """What a claim asks of Kafka."""

    def ask_topic_id(self, topic: str) -> Callable[[], UUID]: ...
    def group_offsets(self, group: str, topic: str) -> GroupOffsets: ...
    def watermarks(self, topic: str, partition: int) -> tuple[int, int]: ...


class Charging(Protocol):
    """Counts a crash before it runs what may bring one about."""

    def take_back(self, connection: Connection, partitions: Collection[int]) -> None:
        """Nobody died of what was charged here, and its next owner, who trusts a clean release, would not look."""

    def forget(self, partitions: Collection[int]) -> None:
        """What was charged here is the next owner's."""


class Ownership:
    """The claims of one worker thread."""

    def __init__(
        self,
        stream: Stream,
        positions: Positions,
        connection: WorkerConnection,
        cluster: Cluster,
        *,
        owner: str,
        mark: Callable[[Claim], None],
        charging: Collection[Charging] = (),
        careful_for: int = 0,
    ) -> None:
        """`mark` puts our mark on the group's offset; raises Retryable. `careful_for`: deliveries after a crash."""
        self._stream = stream
        self._positions = positions
        self._connection = connection
        connection.on_open = self._renew_all
        self._cluster = cluster
        self._owner = owner
        self._mark = mark
        self._charging = charging
        self._careful_for = careful_for
        self.claims: dict[int, Claim] = {}
        self._left: list[Claim] = []
        """Claims on partitions that went to others: to be released, so that those need not fear a crash."""
        self._careful: dict[int, int] = {}
        """Partitions whose owners die without getting on, and for how many deliveries to be careful."""
        self._waiting: dict[int, tuple[float, Claim | None]] = {}
        """Assigned, paused, not ours: when to claim, and the claim to renew if its outcome is in doubt."""

    # --- assignment (called inside the consumer's callbacks) ---

    def assigned(self, partitions: Iterable[int]) -> dict[int, int | None]:
        """Claim what the group gave us; None for a partition that must wait for the database or Kafka."""
        wanted = sorted(partitions)
        self.revoked(wanted)
        if wanted:
            events.emit("consume.claiming", partitions=wanted)
        try:
            self.check_topic()
            offsets = self._cluster.group_offsets(self._stream.consumer, self._stream.topic)
            return {partition: self._start_of(partition, offsets) for partition in wanted}
        except Retryable as trouble:
            log.warning(
                "%s: partitions %s not claimed yet: %s They stay paused; nothing is lost",
                self._stream.consumer,
                wanted,
                trouble,
            )
            for partition in wanted:
                self._wait(partition, clock.monotonic(), None)
            return dict.fromkeys(wanted)

    def _start_of(self, partition: int, offsets: GroupOffsets) -> int | None:
        if _is_foreign(partition, offsets):
            # It gets our mark first, and a commit inside a callback waits for the rebalance it is part of.
            self._wait(partition, clock.monotonic(), None)
            return None
        return self._claim(partition, offsets).next_offset

    def revoked(self, partitions: Iterable[int]) -> None:
        """Forget the claims; only local state, no transaction is open here and none is opened."""
        for partition in partitions:
            claim = self.claims.pop(partition, None)
            if claim is not None:
                self._left.append(claim)
            self._waiting.pop(partition, None)
            self._careful.pop(partition, None)

    # --- after a crash ---

    def careful(self) -> set[int]:
        """Partitions of which any message may end the process."""
        return self._careful.keys() & self.claims.keys()

    def unclean(self) -> set[int]:
        """Partitions whose last owner died: perhaps of a parked message, which moves no position."""
        return {partition for partition, claim in self.claims.items() if claim.unclean}

    def survived(self, partition: int, deliveries: int) -> None:
        """So many more deliveries of it did no harm."""
        left = self._careful.get(partition, 0) - deliveries
        if left > 0:
            self._careful[partition] = left
        else:
            self._careful.pop(partition, None)

    # --- losing and claiming again ---

    def fenced(self, partitions: Iterable[int]) -> None:
        """Somebody else has claimed these: give way, and claim again only if the group still says they are ours.

        Without the second claim, a late claim of a member that was frozen would leave the partition to nobody; without
        the pause, two members that both believe in their assignment would fence each other for ever.
        """
        for partition in partitions:
            self._wait(partition, clock.monotonic() + clock.jitter(0.5, 1.5), None)

    def in_doubt(self) -> None:
        """The connection is gone, and with it the knowledge of where we stand: every claim must be renewed."""
        self._connection.discard()
        self._renew_all()

    def _renew_all(self) -> None:
        # The rows name the backend of the old connection: a successor could not end the new one (ClientWrite).
        for partition, claim in tuple(self.claims.items()):
            self._wait(partition, clock.monotonic(), claim)

    def postpone(self, seconds: float) -> None:
        """The database is away: try again later."""
        for partition, (_, claim) in tuple(self._waiting.items()):
            self._wait(partition, clock.monotonic() + seconds, claim)

    def due(self) -> list[int]:
        """Partitions whose time to be claimed has come."""
        now = clock.monotonic()
        return sorted(partition for partition, (when, _) in self._waiting.items() if when <= now)

    @property
    def waiting(self) -> bool:
        return bool(self._waiting)

    def claim_waiting(self, partition: int) -> Claim | None:
        """Claim a waiting partition; None when it went to somebody else while we were in doubt."""
        doubtful = self._waiting[partition][1]
        if doubtful is not None:
            return self._renew(partition, doubtful)
        self.check_topic()
        return self._claim(partition, self._cluster.group_offsets(self._stream.consumer, self._stream.topic))

    def lost(self) -> set[int]:
        """Claims that are no longer ours; without asking, a quiet partition moved by hand would stand still."""
        if not self.claims:
            return set()
        with self._connection.begin("check the claims", opening=False) as connection:
            return self._positions.lost(connection, self._stream, self.claims.values())

    def release_left(self) -> None:
        """Release what went to others in a rebalance; outside the callback, where no transaction is opened for it.

        Best effort, and nothing where the successor has claimed already: it is only more careful for a while.
        """
        left, self._left = self._left, []
        if left:
            self._release("release partitions that went to others", left)
            events.emit("consume.released", partitions=sorted(claim.partition for claim in left))

    def release(self) -> None:
        """Leave cleanly; best effort, a crash leaves the owner's name in the row and nothing else."""
        if self.claims:
            self._release("release the partitions", self.claims.values())
            events.emit("consume.released", partitions=sorted(self.claims))
            self.claims.clear()

    def _release(self, what: str, claims: Iterable[Claim]) -> None:
        held = list(claims)  # a connection that had to be opened anew empties `self.claims`
        with self._connection.begin(what) as connection:
            ours = self._positions.release(connection, self._stream, held)
            for one in self._charging:
                one.take_back(connection, ours)
        for one in self._charging:
            one.forget({claim.partition for claim in held})

    # --- claiming ---

    def _renew(self, partition: int, doubtful: Claim) -> Claim | None:
        with self._connection.begin("renew a claim") as connection:
            renewed = self._positions.claim_again(connection, self._stream, doubtful)
            if renewed is not None and renewed.next_offset < doubtful.next_offset:
                raise set_back(self._stream, partition, renewed.next_offset, doubtful.next_offset)
        if renewed is None:
            self.fenced([partition])
            return None
        happened = "had happened" if renewed.next_offset != doubtful.next_offset else "had not happened"
        log.warning(
            "%s[%d]: the last COMMIT %s; going on at %d", self._stream.topic, partition, happened, renewed.next_offset
        )
        return self._hold(renewed)

    def _claim(self, partition: int, offsets: GroupOffsets) -> Claim:
        try:
            claim = self._take(partition, offsets)
        except Conflict:
            # lock_timeout: the previous owner's transaction is still open, longer than any idle timeout allows. It is
            # frozen while the server sends to it (wait event ClientWrite), where no timeout of the server fires.
            self._terminate_holder(partition)
            claim = self._take(partition, offsets)
        self.claims[partition] = claim  # close() releases it if the range is refused
        if claim.stuck:
            self._careful[partition] = self._careful_for
        self._check_range(claim)
        if _is_foreign(partition, offsets):
            # Left as it is, it would look like somebody's hand as soon as we have moved on and died.
            self._mark(claim)
        return self._hold(claim)

    def _take(self, partition: int, offsets: GroupOffsets) -> Claim:
        with self._connection.begin("claim a partition") as connection:
            claim = self._positions.claim(connection, self._stream, partition, owner=self._owner)
            if partition in offsets:
                # Inside the transaction: a claim that is refused must leave the row's epoch as it was, or the next
                # start would take the offset for one from before `eo position set`.
                offset, mark = offsets[partition]
                refuse_moved_offset(self._stream, claim, offset, epoch_of_mark(mark))
            return claim

    def _terminate_holder(self, partition: int) -> None:
        with self._connection.begin("end the previous owner's transaction") as connection:
            ended = self._positions.terminate_holder(connection, self._stream, partition)
        log.warning(
            "%s[%d]: previous owner held the row beyond lock_timeout; its backend was %s",
            self._stream.topic,
            partition,
            "terminated, its transaction rolls back" if ended else "not found, claiming again",
        )
        events.emit("consume.holder_terminated", partition=partition, ended=ended)

    def _hold(self, claim: Claim) -> Claim:
        self.claims[claim.partition] = claim
        self._waiting.pop(claim.partition, None)
        log.info(
            "%s: claimed %s[%d] at %d, epoch %d",
            self._stream.consumer,
            self._stream.topic,
            claim.partition,
            claim.next_offset,
            claim.epoch,
        )
        events.emit("consume.claimed", partition=claim.partition, offset=claim.next_offset, epoch=claim.epoch)
        return claim

    def _wait(self, partition: int, until: float, doubtful: Claim | None) -> None:
        self.claims.pop(partition, None)
        self._waiting[partition] = (until, doubtful)

    # --- refusing ---

    def _check_range(self, claim: Claim) -> None:
        low, high = self._cluster.watermarks(self._stream.topic, claim.partition)
        if not low <= claim.next_offset <= high:
            raise offset_out_of_range(
                self._stream.consumer,
                self._stream.topic,
                claim.partition,
                f"it is {claim.next_offset}, the log holds {low} to {high}",
            )

    def check_topic(self) -> None:
        """Stop if the topic was deleted or re-created."""
        self.ask_topic()()

    def ask_topic(self) -> Callable[[], None]:
        """Ask now whether the topic is the one it was; calling what is returned takes the answer, or stops."""
        stream = self._stream
        return ask_same_topic(self._cluster, consumer=stream.consumer, topic=stream.topic, topic_id=stream.topic_id)


def _is_foreign(partition: int, offsets: GroupOffsets) -> bool:
    """Whether the group's offset was committed by somebody else, such as a consumer whose offsets we adopted."""
    return partition in offsets and epoch_of_mark(offsets[partition][1]) is None
