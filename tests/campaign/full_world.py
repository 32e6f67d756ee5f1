"""One run: a database and topics of its own, processes that meet their fates under load; then healing and judgement."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError

from eoframework import clock
from tests.campaign import history as histories
from tests.campaign import ledger_reading as reading
from tests.campaign.checker import Violation, check
from tests.campaign.full_load import Load
from tests.campaign.full_nursery import Zygote
from tests.campaign.full_places import proxy_before, through, throw_away_database
from tests.campaign.full_slots import APP, Slot, Tally
from tests.campaign.ledger import SOURCES, Place, Sample, Snapshot, sends
from tests.campaign.nemeses import PEACE, Fate, Role, lives, pairs_of_lives
from tests.campaign.nemeses_network import LateRequests
from tests.campaign.nemeses_upkeep import Archive, Upkeep
from tests.campaign.nemeses_world import Disturbances
from tests.conftest import Addresses
from tests.proxy import Proxy

PARTITIONS = 2
DRAIN_WITHIN = 60.0
_BUSIEST = 5.0
_ENTRIES_A_KILL = 8
# Below the session, which below the idle time-out of a transaction, and so on: what waits for whom.
_SETTINGS = {
    "EO_MAX_BATCH": "20",
    "EO_MAX_WAIT": "0.1",
    "EO_OFFSET_COMMIT_INTERVAL": "0.3",
    "EO_IDLE_IN_TRANSACTION_TIMEOUT": "5",
    "EO_LOCK_TIMEOUT": "8",
    "EO_STATEMENT_TIMEOUT": "12",
    "EO_RELAY_LEASE": "1",
    "EO_RELAY_BATCH": "50",
    "EO_TRANSFORM_BATCH": "40",
    "EO_TRANSFORM_TRANSACTION_TIMEOUT": "2.5",
    "EO_TRANSFORM_MESSAGE_TIMEOUT": "2",
    "EO_KAFKA_METADATA_MAX_AGE_MS": "60000",
}
_STATIC = {
    "EO_GROUP_PROTOCOL": "classic",
    "EO_KAFKA_SESSION_TIMEOUT_MS": "3000",
    "EO_KAFKA_HEARTBEAT_INTERVAL_MS": "500",
    "CAMPAIGN_STATIC": "1",
}


class Outage(Protocol):
    """Breaks a service and mends it."""

    def __call__(self, seconds: float, counts: Counter[str]) -> None:
        """Called now and then, with the seconds since the run began: do what is due, and count it."""

    def heal(self, counts: Counter[str]) -> None:
        """Mend what is broken still."""


@dataclass(frozen=True)
class Plan:
    """What a run is to be; with its seed it is the same run again."""

    seed: str
    kills: int = 25
    longest: float = 60.0
    """Seconds of faults, however many kills that was."""
    only: Collection[str] = ()
    """Crash points; none: all."""
    pairs: Sequence[tuple[Role, str, str]] = ()
    gentle: bool = False
    """Crash points and nothing else."""
    roles: tuple[Role, ...] = ("book", "settle", "crumble", "relay")
    patience: float = DRAIN_WITHIN
    """Seconds that the drain may last."""
    without: str = ""
    """A protection that the processes run without."""
    outage: Outage | None = None
    network: LateRequests | None = None
    """Brings single requests late."""
    upkeep: bool = False
    """What was processed is deleted from the topics."""
    long: bool = False
    """Most processes are left alone for seconds."""


@dataclass
class Result:
    """What came of it."""

    plan: Plan
    tally: Tally
    violations: list[Violation] = field(default_factory=list)
    seconds: float = 0.0
    sent: int = 0
    drained: float | None = None
    aborted: int = 0
    """Records that a read_uncommitted reader sees and others do not."""
    snapshot: Snapshot = field(default_factory=Snapshot)
    """What was judged."""


class World:
    """One run of a plan."""

    def __init__(
        self,
        addresses: Addresses,
        template: str,
        zygote: Zygote,
        directory: Path,
        plan: Plan,
        *,
        stop: threading.Event | None = None,
    ) -> None:
        """`stop`: set, it comes to its end at once, is drained and judged."""
        self._stop = stop or threading.Event()
        self.addresses, self._template, self._zygote, self.plan = addresses, template, zygote, plan
        self._chance = random.Random(plan.seed)
        self.name = f"w{plan.seed.replace(':', '-')}-{uuid.uuid4().hex[:8]}"
        self.directory = directory / self.name
        self.directory.mkdir(parents=True)
        self._static = self._chance.random() < 0.5
        self._cuts = self._chance.random() < 0.3 and not plan.gentle and plan.outage is None
        self._twice = self._chance.random() < 0.4
        self._keys = self._chance.choice((1, 3, 8))
        self.tally = Tally()
        self._samples: list[Sample] = []
        self._sample_at = 0.0
        self.slots: list[Slot] = []
        self._admin = AdminClient({"bootstrap.servers": addresses.bootstrap_servers, "log_level": 0})
        self._groups = reading.Groups(addresses.bootstrap_servers)
        self._archive = Archive(addresses.bootstrap_servers, self.name)

    # --- from beginning to end ---

    def run(self) -> Result:
        """Raises whatever the harness itself stumbles over; what the run did is in its history then."""
        began = clock.monotonic()
        result = Result(self.plan, self.tally)
        with ExitStack() as stack:
            stack.callback(self._groups.close)
            history = stack.enter_context(histories.History(self.directory / "history.jsonl"))
            url = stack.enter_context(throw_away_database(self.addresses, self.name, template=self._template))
            engine = create_engine(url, connect_args={"application_name": "campaign"}, pool_pre_ping=True)
            stack.callback(engine.dispose)
            proxy = stack.enter_context(proxy_before(url)) if self._cuts else None
            self._prepare(url, proxy, history)
            stack.callback(self._end_everything)
            load = Load(
                self.addresses.bootstrap_servers, f"{self.name}.entries", history, self._chance, keys=self._keys
            )
            disturbances = Disturbances(engine, proxy, f"{self.plan.seed} world", history, self.tally.kinds)
            self._torment(engine, load, disturbances)
            if self.plan.outage is not None:
                self.plan.outage.heal(self.tally.kinds)
            load.finish()
            disturbances.heal()
            if self.plan.network is not None:
                self.plan.network.rest(self.tally.kinds)
            with reading.Tail(self.addresses.bootstrap_servers) as tail:
                result.drained = self._drain(engine, history, tail)
            if self.plan.network is not None:
                self.plan.network.end(self.tally.kinds)
                self.tally.answers += self.plan.network.answers
            snapshot = self._snapshot(engine, result.drained)
        result.violations, result.sent, result.snapshot = check(snapshot), load.sent, snapshot
        result.aborted = sum(map(len, snapshot.uncommitted.values())) - sum(map(len, snapshot.committed.values()))
        result.seconds = clock.monotonic() - began
        if not result.violations:
            self._forget()
        return result

    def _prepare(self, url: str, proxy: Proxy | None, history: histories.History) -> None:
        told = {"EO_DATABASE_URL": url, "EO_KAFKA_BOOTSTRAP_SERVERS": self.addresses.bootstrap_servers}
        environment = {**told, **_SETTINGS, "CAMPAIGN_WORLD": self.name, "CAMPAIGN_PARTITIONS": str(PARTITIONS)}
        history.done("run", seed=self.plan.seed, static=self._static, cuts=self._cuts, keys=self._keys)
        self._apply_topics(environment)
        if proxy is not None:
            environment["EO_DATABASE_URL"] = through(url, proxy)
        if self._static:
            environment |= _STATIC
        if self.plan.without:
            environment["CAMPAIGN_WITHOUT"] = self.plan.without
        for name, role in self._names():
            seed = f"{self.plan.seed} {name}"
            pairs = [(first, second) for of, first, second in self.plan.pairs if of == role]
            fates = (
                pairs_of_lives(seed, role, pairs)
                if pairs
                else lives(seed, role, only=self.plan.only, gentle=self.plan.gentle, long=self.plan.long)
            )
            self.slots.append(
                Slot(
                    *(name, role, fates),
                    zygote=self._zygote,
                    environment=environment,
                    directory=self.directory,
                    history=history,
                    tally=self.tally,
                )
            )

    def _names(self) -> Iterator[tuple[str, Role]]:
        for role in self.plan.roles:
            twice = role == "relay" or (self._twice and role in ("book", "crumble"))
            for number in range(2 if twice else 1):
                yield f"{role}{number}", role

    def _apply_topics(self, environment: dict[str, str]) -> None:
        log = self.directory / "topics.log"
        pid = self._zygote.spawn(["topics", "apply", APP], environment, log)
        deadline = clock.monotonic() + 60
        while True:
            code = self._zygote.ended().get(pid)
            if code is not None:
                break
            assert clock.monotonic() < deadline, f"topics were not made: {log}"
            clock.sleep(0.02)
        assert code == 0, f"topics were not made: {log.read_text()[-2000:]}"

    # --- faults ---

    def _torment(self, engine: Engine, load: Load, disturbances: Disturbances) -> None:
        upkeep = self._upkeep(engine) if self.plan.upkeep else None
        for slot in self.slots:
            slot.start()
        began = clock.monotonic()
        until = began + self.plan.longest
        while self.tally.kills < self.plan.kills and clock.monotonic() < until and not self._stop.is_set():
            self._attend()
            backlog = self._chance.random()
            if backlog < 0.6 and self._wants_more(load):
                load.send(1 + int(backlog * 6))
            if not self.plan.gentle:
                disturbances.look()
                if backlog < 0.01:
                    load.abort_some()
                    self.tally.kinds["aborted entries"] += 1
            if self.plan.outage is not None:
                self.plan.outage(clock.monotonic() - began, self.tally.kinds)
            if self.plan.network is not None:
                self.plan.network(clock.monotonic() - began, self.tally.kinds)
            if upkeep is not None:
                upkeep(clock.monotonic() - began, self.tally.kinds)
            self._sample(engine)
            clock.sleep(0.02)

    def _wants_more(self, load: Load) -> bool:
        """What waits at the end is worked off before judgement: seen, half of a run's time, in which nobody dies."""
        few = load.sent < _ENTRIES_A_KILL * (self.tally.kills + 5)
        return few or self.plan.long or self.plan.outage is not None or bool(self.plan.without)

    def _upkeep(self, engine: Engine) -> Upkeep:
        upkeep = Upkeep(self._archive, self._admin, engine, self.name, self.plan.seed, offsets=self._offsets)
        upkeep.begin()
        return upkeep

    def _attend(self, fate: Fate | None = None) -> None:
        """Whoever has ended is followed by the next one; None: with what the seed has for it."""
        for pid, code in self._zygote.ended().items():
            for slot in self.slots:
                if slot.ended(pid, code):
                    slot.start(fate)
        for slot in self.slots:
            slot.look()

    def _sample(self, engine: Engine) -> None:
        # Not while brokers die: librdkafka's AdminClient may abort its whole process over a question that one of them
        # has left unanswered (seen: "rd_kafka_enq_once_del_source_return: Assertion `eonce->refcnt > 0' failed").
        if clock.monotonic() < self._sample_at or self.plan.outage is not None:
            return
        self._sample_at = clock.monotonic() + 1.5
        # Kafka first: the position only grows meanwhile.
        with suppress(KafkaException, DBAPIError):  # whoever cannot be asked now is asked again
            offsets = self._offsets()
            with engine.connect() as connection:
                there = reading.positions(connection)
            handlers = {place: offset for place, offset in offsets.items() if place[0] != "crumble"}
            self._samples += reading.sampled(handlers, there)

    def _offsets(self) -> dict[Place, int]:
        found: dict[Place, int] = {}
        for consumer in (one for one in SOURCES if one in self.plan.roles):
            group, topic = f"{self.name}.{consumer}", f"{self.name}.{SOURCES[consumer]}"
            offsets = self._groups.offsets(group, topic, PARTITIONS)
            found |= {(consumer, partition): offset for partition, offset in offsets.items()}
        return found

    # --- healing, draining ---

    def _drain(self, engine: Engine, history: histories.History, tail: reading.Tail) -> float | None:
        """Everything armed is killed; peaceful processes run until nothing is left to do, and end in order."""
        self._end_everything()
        began = clock.monotonic()
        for slot in self.slots:
            slot.start(PEACE)
        drained, busy = None, _busy()
        while drained is None and clock.monotonic() - began < self.plan.patience * busy:
            clock.sleep(0.1)
            self._attend(PEACE)
            if self._is_drained(engine, tail):
                drained = (clock.monotonic() - began) / busy
        history.done("drained", seconds=drained, busy=busy)
        self._end_in_order()
        return drained

    def _is_drained(self, engine: Engine, tail: reading.Tail) -> bool:
        left = reading.left(engine)
        waiting = left["parked messages"] + left["shut lanes"]
        waiting += reading.held_by_the_dead(engine, [slot.pid for slot in self.slots])
        if "relay" in self.plan.roles:
            waiting += left["outbox rows"]
        if waiting:
            return False
        offsets = self._offsets()
        with engine.connect() as connection:
            there = reading.positions(connection)
        names = {consumer: f"{self.name}.{source}" for consumer, source in SOURCES.items()}
        ends = reading.log_ends(self._admin, list(names.values()), PARTITIONS)
        for (consumer, partition), offset in offsets.items():
            end = ends[names[consumer], partition]
            at = there.get((consumer, partition), offset)
            # Markers at the end are no records: whoever has read to the last record may stand before them.
            if offset != at or (at < end and tail.has_more(names[consumer], partition, at)):
                return False
        return True

    def _end_in_order(self) -> None:
        for slot in self.slots:
            slot.end(signal.SIGTERM)
        self._wait_for_all(20.0)
        self.tally.exits["left over"] += sum(len(slot.pids) for slot in self.slots)

    def _end_everything(self) -> None:
        for slot in self.slots:
            slot.end(signal.SIGKILL)
        self._wait_for_all(20.0)

    def _wait_for_all(self, seconds: float) -> None:
        deadline = clock.monotonic() + seconds
        while any(slot.pids for slot in self.slots) and clock.monotonic() < deadline:
            for pid, code in self._zygote.ended().items():
                for slot in self.slots:
                    slot.ended(pid, code, expected=True)
            clock.sleep(0.01)

    # --- judgement ---

    def _snapshot(self, engine: Engine, drained: float | None) -> Snapshot:
        open_ = reading.held_up(self._admin, self.name, PARTITIONS) + reading.open_transactions(engine)
        committed = self._archive.read("read_committed")
        leaks = Counter(reading.left_behind(engine)) + Counter(processes=sum(len(slot.pids) for slot in self.slots))
        part = reading.database_part(engine)
        offsets = self._offsets()
        part["positions"] |= {place: offset for place, offset in offsets.items() if place[0] == "crumble"}
        return Snapshot(
            sends=sends(histories.read(self.directory / "history.jsonl")),
            committed=committed,
            uncommitted=self._archive.read("read_uncommitted"),
            group_offsets=offsets,
            ends=reading.last_records(committed),
            samples=tuple(self._samples),
            drained_after=drained,
            open_transactions=tuple(open_),
            leaks=leaks,
            **part,
        )

    def _forget(self) -> None:
        """Topics and files of a run in which nothing was wrong."""
        names = [name for name in self._admin.list_topics(timeout=20).topics if self.name in name]
        for future in self._admin.delete_topics(names).values():
            with suppress(KafkaException):  # the broker's disk is thrown away in the end
                future.result(20)
        shutil.rmtree(self.directory)


def _busy() -> float:
    """How many times slower than by itself this runs, on a machine that is shared."""
    return min(_BUSIEST, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))
