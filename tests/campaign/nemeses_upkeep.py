"""Retention at work: records that were processed are deleted under the processes' feet, the checker has read them.

Besides, segments are rolled and thrown away all the time, and Kafka forgets transactional ids that rest for a moment.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from tests.campaign import ledger_reading as reading
from tests.campaign.ledger import SOURCES, Place, Read

BROKER = {
    "log.retention.check.interval.ms": "500",
    "log.segment.delete.delay.ms": "100",
    "transactional.id.expiration.ms": "3000",
    "transaction.remove.expired.transaction.cleanup.interval.ms": "500",
}
"""How a broker must be set up for this: deleted soon, forgotten soon."""
_SEGMENTS = {"segment.ms": "300", "file.delete.delay.ms": "100"}
_ISOLATIONS = ("read_committed", "read_uncommitted")
_READ_WITHIN = 20.0


class Archive:
    """All that stood in a run's topics: what was kept before it was deleted, and what is still there."""

    def __init__(self, servers: str, world: str) -> None:
        self._servers, self._world = servers, world
        self._names = reading.topic_names(world)
        self._from: dict[Place, int] = {}
        self._kept: dict[str, dict[str, tuple[Read, ...]]] = {each: {} for each in _ISOLATIONS}

    def keep(self, upto: Mapping[Place, int]) -> None:
        """Read these partitions of these topics, by their short names, up to these offsets."""
        ends = {(self._names[topic], partition): end for (topic, partition), end in upto.items()}
        found = {each: self._read(each, ends) for each in _ISOLATIONS}
        for isolation, reads in found.items():
            for topic, several in reads.items():
                self._kept[isolation][topic] = self._kept[isolation].get(topic, ()) + several
        self._from |= ends

    def read(self, isolation: str) -> dict[str, tuple[Read, ...]]:
        """Everything, each partition in its order."""
        rest = reading.read_all(self._servers, self._world, isolation=isolation, since=self._from)
        return {topic: self._kept[isolation].get(topic, ()) + reads for topic, reads in rest.items()}

    def _read(self, isolation: str, ends: Mapping[Place, int]) -> dict[str, tuple[Read, ...]]:
        whole = reading.read_all(
            self._servers, self._world, isolation=isolation, since=self._from, only=ends, within=_READ_WITHIN
        )
        return {
            topic: tuple(read for read in reads if read.offset < ends[self._names[topic], read.partition])
            for topic, reads in whole.items()
        }


class Upkeep:
    """Deletes, now and then, up to where each consumer stands."""

    def __init__(
        self,
        archive: Archive,
        admin: AdminClient,
        engine: Engine,
        world: str,
        seed: str,
        *,
        offsets: Callable[[], dict[Place, int]],
    ) -> None:
        """`offsets`: of the groups."""
        self._archive, self._admin, self._engine, self._offsets = archive, admin, engine, offsets
        self._names = reading.topic_names(world)
        self._chance = random.Random(f"{seed} upkeep")
        self._next = 1.0
        self._deleted: dict[Place, int] = {}

    def begin(self) -> None:
        """Small segments from now on."""
        entries = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in _SEGMENTS.items()
        ]
        names = [self._names[topic] for topic in SOURCES.values()]
        asked = [ConfigResource(ResourceType.TOPIC, name, incremental_configs=entries) for name in names]
        for future in self._admin.incremental_alter_configs(asked).values():
            future.result(20)

    def __call__(self, seconds: float, counts: Counter[str]) -> None:
        """Delete if it is time, and count it by how far."""
        if seconds < self._next:
            return
        self._next = seconds + self._chance.uniform(0.5, 3.0)
        how = self._chance.choice(("group's offset", "position"))
        with suppress(KafkaException, DBAPIError):  # whoever cannot be asked now is asked again
            upto = self._reached(how)
            if upto:
                self._archive.keep(upto)
                self._delete(upto)
                counts[f"records deleted to the {how}"] += len(upto)

    def _reached(self, how: str) -> dict[Place, int]:
        """By topic and partition, where whoever reads it has got to; without those that have not moved."""
        places = self._offsets()
        if how == "position":
            with self._engine.connect() as connection:
                places |= reading.positions(connection)
        reached: dict[Place, int] = {(SOURCES[consumer], partition): at for (consumer, partition), at in places.items()}
        return {place: at for place, at in reached.items() if at > self._deleted.get(place, 0)}

    def _delete(self, upto: Mapping[Place, int]) -> None:
        asked = [TopicPartition(self._names[topic], partition, at) for (topic, partition), at in upto.items()]
        for where, future in self._admin.delete_records(asked).items():
            future.result(20)
            short = next(topic for topic, name in self._names.items() if name == where.topic)
            self._deleted[short, where.partition] = upto[short, where.partition]
