"""Kafka's own test of its transactions (transactions_test.py of its system tests), with transforms as the copiers.

`python -m tests.transform.copier_campaign --messages 100000`: two copiers of one group copy a topic, 750 messages a
Kafka transaction; past 20 % of the way they are killed (SIGKILL) one after the other, and others started; in the end
each message is there once, and those of one partition in their order. It uses the services that EO_ settings point at,
else its own.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from confluent_kafka import TopicPartition

from eoframework import clock
from eoframework.db import migrating
from eoframework.db.session import open_database
from eoframework.schema import Schema
from eoframework.settings import Settings
from tests.conftest import Addresses, database_named, make_settings
from tests.console_reader import console_read
from tests.consume.nursery import Forked, Nursery
from tests.parallel import services_of_the_settings, start_services
from tests.processes import produce, settings_environment
from tests.transform.scene import admin_client, committed, create_topics, offsets_reader

COPIERS = 2
TRANSACTION = 750
FROM = 0.2
"""The share of the way from which on copiers are killed, and the least way from one kill to the next."""
STEP = 0.1
_LONGEST = 240.0

# The group's session is short: it is what a kill costs.
QUICK = {
    "EO_GROUP_PROTOCOL": "classic",
    "EO_KAFKA_SESSION_TIMEOUT_MS": "2000",
    "EO_TRANSFORM_TRANSACTION_TIMEOUT": "1.8",
    "EO_TRANSFORM_MESSAGE_TIMEOUT": "1.5",
    "EO_TRANSFORM_BATCH": str(TRANSACTION),
    "EO_MAX_WAIT": "0.1",
}


@dataclass
class Campaign:
    """One topic to copy, and the copiers."""

    settings: Settings
    nursery: Nursery
    directory: Path
    messages: int
    partitions: int
    environment: dict[str, str] = field(default_factory=dict)
    kills: list[float] = field(default_factory=list)
    """How far the copying was at each kill."""
    _started: int = 0

    def __post_init__(self) -> None:
        unique = uuid.uuid4().hex[:10]
        self.servers = self.settings.require_bootstrap_servers()
        self.source, self.target = f"copier.source.{unique}", f"copier.target.{unique}"
        self.group = f"copier-{self.source}.copy"
        topics = {self.source: self.partitions, self.target: self.partitions, f"{self.group}.dlt": 1}
        create_topics(self.servers, topics)

    def fill(self) -> None:
        """Number n goes to partition n modulo the number of partitions: each one has its order."""
        for partition in range(self.partitions):
            numbers = range(partition, self.messages, self.partitions)
            key = f"p{partition}".encode()
            produce(self.servers, self.source, ((key, b'{"n":%d}' % n) for n in numbers), partition=partition)

    def run(self, *, kills: int) -> None:
        """Copy everything, with so many kills on the way; raises AssertionError if that takes for ever."""
        copiers = [self._start() for _ in range(COPIERS)]
        reader = offsets_reader(self.servers, self.group)
        asked = [TopicPartition(self.source, partition) for partition in range(self.partitions)]
        deadline, next_kill = clock.monotonic() + _LONGEST, FROM
        while (progress := sum(committed(reader, asked).values()) / self.messages) < 1:
            assert clock.monotonic() < deadline, f"{progress:.0%} copied\n{copiers[0].output()}"
            if len(self.kills) < kills and progress >= next_kill:
                self._replace_one(copiers)
                self.kills.append(progress)
                next_kill = progress + STEP
            clock.sleep(0.005)
        reader.close()
        for copier in copiers:
            copier.signal(signal.SIGTERM)
            assert copier.wait() == 0, copier.output()

    def _replace_one(self, copiers: list[Forked]) -> None:
        """Kill a copier that has something to copy, the one that has lived longest, and start another."""
        told = admin_client(self.servers).describe_consumer_groups([self.group], request_timeout=10)[self.group]
        busy = [member.client_id for member in told.result().members if member.assignment.topic_partitions]
        victim = next((one for one in copiers if any(f":{one.pid}:" in client for client in busy)), copiers[0])
        victim.signal(signal.SIGKILL)
        victim.wait()
        copiers.remove(victim)
        copiers.append(self._start())

    def check(self) -> None:
        """Each message once; by the broker's own consumer, which knows nothing of us, nor of our client."""
        shown = console_read(self.servers, self.target, at_least=self.messages)
        orders: dict[str | None, list[int]] = {}
        for record in shown:
            orders.setdefault(record.key, []).append(int((record.value or "").removeprefix('{"n":').removesuffix("}")))
        for partition in range(self.partitions):
            expected = list(range(partition, self.messages, self.partitions))
            assert orders.pop(f"p{partition}", []) == expected, f"partition {partition}: lost, repeated or out of order"
        assert not orders

    def aborted(self) -> int:
        """How many more records a read_uncommitted reader sees: the kills did strike."""
        everything = console_read(self.servers, self.target, isolation="read_uncommitted", at_least=self.messages)
        return len(everything) - self.messages

    def _start(self) -> Forked:
        self._started += 1
        environment = settings_environment(
            self.settings, COPIER_SOURCE=self.source, COPIER_TARGET=self.target, **QUICK, **self.environment
        )
        log = self.directory / f"copier{self._started}.log"
        return self.nursery.spawn("run", "tests.apps.copier:app", environment=environment, log=log)


@contextmanager
def open_campaign(
    services: Addresses, directory: Path, *, messages: int, partitions: int = 1, template: str | None = None
) -> Iterator[Campaign]:
    """A campaign whose database and processes are gone at the end."""
    source = template.rsplit("/", 1)[1] if template else None
    with database_named(services, f"eo_copier_{uuid.uuid4().hex[:12]}", source=source) as url, Nursery() as nursery:
        if source is None:
            database = open_database(url, Schema())
            migrating.upgrade(database)
            database.engine.dispose()
        yield Campaign(make_settings(url, services.bootstrap_servers), nursery, directory, messages, partitions)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--partitions", type=int, default=1)
    parser.add_argument("--kills", type=int, default=6)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eo-copiers-")))
        found = services_of_the_settings()
        if found is None:
            services = stack.enter_context(start_services(directory))
            found = services.database_url, services.bootstrap_servers
        campaign = stack.enter_context(
            open_campaign(Addresses(*found), directory, messages=arguments.messages, partitions=arguments.partitions)
        )
        campaign.fill()
        started = clock.monotonic()
        campaign.run(kills=arguments.kills)
        taken = clock.monotonic() - started
        campaign.check()
        print(
            f"{campaign.messages} messages, {campaign.partitions} partitions, {TRANSACTION} a transaction, copied in "
            f"{taken:.1f} s; killed at {', '.join(f'{kill:.0%}' for kill in campaign.kills)}; "
            f"{campaign.aborted()} records were in transactions that were aborted; each message is there once, in order"
        )
    return 0 if len(campaign.kills) >= min(3, arguments.kills) else 1


if __name__ == "__main__":
    sys.exit(main())
