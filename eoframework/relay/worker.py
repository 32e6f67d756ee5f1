"""One relay process: takes its fair share of the shards, runs each on a thread, gives back what others should have."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import threading
from collections.abc import Collection

from eoframework import clock, events
from eoframework.db.pending import PendingRows
from eoframework.db.session import Database
from eoframework.db.shards import Claim, Shards, Standing
from eoframework.errors import ConfigurationError, Fenced, Retryable
from eoframework.kafka.admin import Admin
from eoframework.kafka.checkpoint import CheckpointLog
from eoframework.relay.recovery import find_place, refuse_set_back
from eoframework.relay.relay import ShardRelay, Surroundings
from eoframework.relay.topics import Topics
from eoframework.settings import Settings

_log = logging.getLogger(__name__)

_WATCH = 0.05
_GRACE = 5.0
_LEAVE_WITHIN = 30.0
_SNAPSHOT_EVERY = 60.0
_SNAPSHOT_TOO_OLD = 300.0


class RelayWorker:
    """Any number of these, in any number of processes, share the shards of one outbox.

    A lease only says who is alive: one that is late, or held by two for a moment, costs time, never a message. Safety
    is the epoch in PostgreSQL and the fence at Kafka (`ShardRelay`).
    """

    name = "relay"

    def __init__(
        self,
        database: Database,
        settings: Settings,
        *,
        admin: Admin | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        """`only` pins this relay to some shards: it takes no others, and has no part in the sharing."""
        self._settings = settings
        self._admin = admin or Admin(settings)
        self._shards = Shards(database, settings)
        self._rows = PendingRows(self._shards)
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._only = None if only is None else frozenset(only)
        self._around: Surroundings | None = None
        self._running: dict[int, _ShardThread] = {}
        self._beat_at = 0.0
        self._snapshot_at = 0.0
        self._drain_to: int | None = None

    def start(self) -> None:
        """Verify outbox and checkpoint topic; takes no shard yet.

        Raises ConfigurationError (no checkpoint topic), FailClosed (another cluster, a lost checkpoint topic, a
        database that was set back).
        """
        outbox_id, shard_count = self._shards.outbox()
        self._refuse_unknown_shards(shard_count)
        checkpoints = CheckpointLog(self._settings, self._admin, outbox_id)
        if self._settings.relay_mode == "transactional":
            place = find_place(checkpoints, self._shards.states(), shard_count=shard_count)
            refuse_set_back(checkpoints, place, self._shards, self._rows)
        else:
            _log.warning("relay runs in idempotent mode: at least once; after a crash a batch may be sent twice.")
        self._around = Surroundings(
            settings=self._settings,
            shards=self._shards,
            rows=self._rows,
            checkpoints=checkpoints,
            topics=Topics(self._admin),
            shard_count=shard_count,
        )

    def step(self) -> float:
        """Look after the shards' threads, and send a heartbeat when one is due. Raises what ended a shard's thread."""
        self._reap()
        now = clock.monotonic()
        if now >= self._beat_at:
            self._balance(self._shards.heartbeat(self._owner, sharing=self._only is None))
            self._beat_at = now + self._settings.relay_lease / 5
            self._watch_snapshots(now)
        return _WATCH

    def drained(self) -> bool:
        """Whether every row that was there (or due) at the first call is published, whoever published it."""
        try:
            if self._drain_to is None:
                self._drain_to = self._due_and_last()
            paused = self._topics().paused()
            left = self._rows.any_left(up_to=self._drain_to, paused=paused, among=self._mine())
            held = 0 if left else self._rows.held_keys()
        except Retryable as error:
            _log.debug("cannot tell yet whether the outbox is drained: %s", error)
            return False
        if not left and paused:
            _log.warning("rows of paused topics stay in the outbox: %s.", ", ".join(sorted(paused)))
        if held:
            _log.warning("rows of %d keys stay in the outbox, behind dead letters: eo outbox ls.", held)
        return not left

    def close(self) -> None:
        """Finish the batches in flight and give every shard back."""
        for thread in self._running.values():
            thread.stop()
        deadline = clock.monotonic() + _LEAVE_WITHIN
        for thread in self._running.values():
            thread.join(deadline - clock.monotonic())
        for thread in list(self._running.values()):
            if not thread.is_alive():
                self._give_back(thread)
        try:
            self._shards.leave(self._owner)
        except Retryable as error:
            _log.info("relay could not sign off (%s); its leases run out by themselves.", error)

    def _balance(self, standing: Standing) -> None:
        for shard, thread in self._running.items():
            if standing.mine.get(shard) != thread.claim.epoch:
                thread.stop()
        for shard, epoch in standing.mine.items():
            if shard not in self._running:
                # Left over from a release that failed: nobody works on it, and our heartbeat keeps others away.
                self._shards.release(Claim(shard, epoch, self._owner))
        among = self._mine()
        share = math.ceil(standing.shards / max(standing.members, 1)) if self._only is None else len(among)
        for shard in sorted(self._running)[share:]:
            self._running[shard].stop()
        if len(self._running) < share:
            for claim in self._shards.acquire(self._owner, limit=share - len(self._running), among=among):
                self._take(claim)

    def _take(self, claim: Claim) -> None:
        assert self._around is not None
        _log.info("relay owns %s.", claim)
        events.emit("relay.claimed", shard=claim.shard, epoch=claim.epoch)
        thread = _ShardThread(claim, self._around)
        self._running[claim.shard] = thread
        thread.start()

    def _reap(self) -> None:
        ended = [thread for thread in self._running.values() if not thread.is_alive()]
        for thread in ended:
            self._give_back(thread)
        for thread in ended:
            if isinstance(thread.error, Fenced):
                _log.warning("%s Nothing is lost: its new owner goes on.", thread.error)
            elif thread.error is not None:
                raise thread.error

    def _give_back(self, thread: _ShardThread) -> None:
        try:
            self._shards.release(thread.claim)
        except Retryable as error:
            _log.info("relay could not give %s back (%s); its lease runs out by itself.", thread.claim, error)
        del self._running[thread.claim.shard]
        events.emit("relay.released", shard=thread.claim.shard, epoch=thread.claim.epoch)

    def _due_and_last(self) -> int:
        _, shard_count = self._shards.outbox()
        for shard in range(shard_count):
            while self._rows.move_due(shard, limit=self._settings.relay_batch):
                continue
        return self._rows.last_seq()

    def _mine(self) -> Collection[int]:
        """The shards this relay may take."""
        assert self._around is not None
        return range(self._around.shard_count) if self._only is None else self._only

    def _refuse_unknown_shards(self, shard_count: int) -> None:
        unknown = sorted((self._only or frozenset()) - set(range(shard_count)))
        if unknown:
            raise ConfigurationError(
                f"--shards names {', '.join(map(str, unknown))}; this outbox has shards 0 to {shard_count - 1}.",
                remedy="Name those, or leave --shards out: then relays share all of them.",
            )

    def _topics(self) -> Topics:
        assert self._around is not None
        return self._around.topics

    def _watch_snapshots(self, now: float) -> None:
        if now < self._snapshot_at:
            return
        self._snapshot_at = now + _SNAPSHOT_EVERY
        oldest = self._shards.oldest_snapshot()
        if oldest is not None and oldest[1] > _SNAPSHOT_TOO_OLD:
            _log.warning(
                "backend %d has had a transaction open for %.0f s: PostgreSQL cannot remove the outbox's dead rows "
                "meanwhile, the relay grows slower; nothing is lost.",
                *oldest,
            )


class _ShardThread:
    """One shard's relay on its thread, and how it ended."""

    def __init__(self, claim: Claim, around: Surroundings) -> None:
        self.claim = claim
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._give_up_at = math.inf
        self._relay = ShardRelay(claim, around, overdue=lambda: clock.monotonic() > self._give_up_at)
        # A daemon: after a second signal no thread may keep the process alive.
        self._thread = threading.Thread(target=self._live, name=f"relay-{claim.shard}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end after the batch in flight; one that Kafka does not confirm is given up after a grace time."""
        if not self._stop.is_set():
            self._give_up_at = clock.monotonic() + _GRACE
            self._stop.set()

    def join(self, timeout: float) -> None:
        self._thread.join(max(timeout, 0))

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _live(self) -> None:
        try:
            while not self._stop.is_set():
                delay = self._relay.step()
                if delay > 0:
                    clock.wait(self._stop, delay)
        except BaseException as error:  # noqa: BLE001 - kept for the coordinator, which raises it on its own thread
            self.error = error
        finally:
            self._relay.close()
