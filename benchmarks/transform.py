"""Messages per second through a transform, against a hand-written transactional loop with the same quarantine.

    eo dev run -- python -m benchmarks.transform [--messages N] [--rounds N]
    eo dev run -- python -m benchmarks.transform --memory [--messages 2000000]

One input topic of 4 partitions, filled once with small JSON messages that carry the headers we write ourselves. Every
contender runs alone in a process of its own, as a member of a new group, into a new topic: batches of at most 5,000,
one Kafka transaction each, outputs and the group's offsets in it. Rounds are interleaved in rotating order. A round
counts only after a read_committed reader has found each input's output once, in the order of its key, with the same
key, value and headers as everybody else's. Its time is the broker's own (LogAppendTime of the outputs), between the
first tenth and the last, so start-up and shut-down count for nobody. The interval at which a transform commits is
raised: on a busy machine it would have smaller transactions than the others. The figures to quote are the ratios of
one run.

  hand             poll, decode (pydantic), function, encode, produce with our headers, flush, offsets, commit
  hand/bare        the same without any headers, neither read nor written: for information
  transform        @app.transform on one payload
  transform/Message  @app.transform on one Message: for information
  transform/batch  @app.transform on a list of payloads

What the loop by hand does, and what not, is said in benchmarks/transform_by_hand.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from benchmarks.transform_by_hand import BATCH, Booked, Deposit, Headers, Usage, book
from eoframework import App, Message, Topic, events, lifecycle
from eoframework.db import migrating
from eoframework.kafka.admin import Admin
from eoframework.settings import Settings
from eoframework.transform.worker import TransformWorker

PARTITIONS = 4
KEYS = 1000
CONTENDERS = ("hand", "transform", "transform/batch", "transform/Message", "hand/bare")

# --- transforms, each in a process of its own -------------------------------------------------------------------------


def transform(name: str, source: str, target: str) -> None:
    """Run one of the three until the input is used up."""
    settings, usage = Settings.load(transform_batch=BATCH, transform_interval=0.5), Usage()
    events.subscribe(lambda event, fields: _watch(usage, event, fields))
    app = App(_app(target), settings=settings)
    deposits, bookings = Topic(source, Deposit, key="account"), Topic(target, Booked, key="account")
    declare = app.transform(deposits, to=bookings, name="booking")
    functions: dict[str, Callable[..., Any]] = {
        "transform": book,
        "transform/Message": _book_message,
        "transform/batch": _book_batch,
    }
    declare(functions[name])
    stop, admin = threading.Event(), Admin(settings)
    admin.create(_dead_letters(target), partitions=1, replicas=1, config={})
    worker = TransformWorker(app.transforms[0], app=app, settings=settings, admin=admin, stop=stop, once=True)
    lifecycle.spare_the_collector()  # as `eo run` does
    code = lifecycle.run([worker], stop=stop, once=True)
    if code:
        raise SystemExit(f"the transform ended with {code}")
    usage.tell()


def _watch(usage: Usage, event: str, fields: dict[str, object]) -> None:
    if event == "kafka.polled":
        usage.seen += int(str(fields["records"]))
    elif event == "kafka.transaction.committed":
        usage.mark()


def _book_message(message: Message[Deposit]) -> Booked:
    return book(message.payload)


def _book_batch(deposits: list[Deposit]) -> list[Booked]:
    return [book(deposit) for deposit in deposits]


# --- the run ----------------------------------------------------------------------------------------------------------


class Bench:
    """One broker, one filled topic."""

    def __init__(self, messages: int) -> None:
        self.messages = messages
        self.settings = Settings.load()
        self.servers: dict[str, Any] = {"bootstrap.servers": self.settings.require_bootstrap_servers()}
        self.admin = Admin(self.settings)
        self.deleter = AdminClient(self.servers)
        migrating.upgrade(App("bench", settings=self.settings).database)
        self.source = f"bench.{uuid.uuid4().hex[:8]}"
        self.admin.create(self.source, partitions=PARTITIONS, replicas=1, config={})
        self.fill()

    def fill(self) -> None:
        producer = Producer({**self.servers, "linger.ms": 20, "partitioner": "murmur2_random"})
        always: Headers = [("ce_specversion", b"1.0"), ("ce_source", b"fill"), ("ce_type", b"Deposit")]
        always += [("ce_time", b"2026-01-01T00:00:00.000000+00:00"), ("content-type", b"application/json")]
        for n in range(self.messages):
            identity = str(uuid.UUID(int=n + 1)).encode()
            own: Headers = [("ce_id", identity), ("message-id", identity), ("traceparent", _trace(n))]
            value = Deposit(n=n, account=_account(n), amount=n % 7).model_dump_json()
            if n % 1000 == 0:
                producer.flush()
            producer.produce(self.source, value, _account(n).encode(), headers=always + own)
        producer.flush()

    def round(self, name: str) -> dict[str, float]:
        """Run one contender, verify what it did; messages per second, and its process's usage."""
        target = f"{self.source}.{uuid.uuid4().hex[:8]}"
        by_broker = {"message.timestamp.type": "LogAppendTime"}
        self.admin.create(target, partitions=PARTITIONS, replicas=1, config=by_broker)
        try:
            command = [sys.executable, "-m", *self.command(name, target)]
            ran = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            times = self.verify(target, headers=name != "hand/bare")
        finally:
            self.delete(target, _dead_letters(target))
        return {"rate": _rate(times), **json.loads(ran.stdout.splitlines()[-1])}

    def command(self, name: str, target: str) -> list[str]:
        if not name.startswith("hand"):
            return ["benchmarks.transform", "--transform", name, "--source", self.source, "--target", target]
        servers, protocol = self.servers["bootstrap.servers"], self.settings.group_protocol
        own = [name, servers, protocol, _app(target), self.source, target, str(self.messages)]
        return ["benchmarks.transform_by_hand", *own]

    def verify(self, target: str, *, headers: bool) -> list[int]:
        """When each output was appended, in milliseconds; the run is INVALID unless all is as it must be."""
        seen = bytearray(self.messages)
        newest: dict[bytes, int] = {}
        ids: set[bytes] = set()
        times = []
        for message in self.read(target):
            value, key = message.value() or b"", message.key() or b""
            booked = Booked.model_validate_json(value)
            wanted = Booked(n=booked.n, account=_account(booked.n), total=booked.n % 7 * 2)
            if booked != wanted or key != wanted.account.encode() or seen[booked.n]:
                raise SystemExit(f"INVALID: {key!r} {value!r}, seen before: {seen[booked.n]}")
            if newest.get(key, -1) > booked.n:
                raise SystemExit(f"INVALID: {key!r}: {booked.n} after {newest[key]}")
            seen[booked.n], newest[key] = 1, booked.n
            found = dict(message.headers() or [])
            if headers and (found != _headers_of(booked.n, target, found) or len(found) != len(message.headers())):
                raise SystemExit(f"INVALID: headers {found}")
            ids.add(bytes(found.get("ce_id") or value))
            times.append(message.timestamp()[1])
        if not len(ids) == len(times) == self.messages:
            raise SystemExit(f"INVALID: {len(times)} outputs, {len(ids)} ids, of {self.messages} messages")
        return times

    def read(self, topic: str) -> Iterator[Any]:
        """All that a read_committed reader sees, partition by partition."""
        one_by_one = {"group.id": "none", "enable.auto.commit": False, "enable.partition.eof": True}
        consumer = Consumer({**self.servers, **one_by_one, "isolation.level": "read_committed"})
        for partition in range(PARTITIONS):
            consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING)])
            while True:
                message = consumer.poll(30)
                if message is None:
                    raise SystemExit("INVALID: the outputs do not end: a transaction is open")
                error = message.error()
                if error is not None and error.code() == KafkaError._PARTITION_EOF:
                    break
                yield message
        consumer.close()

    def delete(self, *topics: str) -> None:
        for deleted in self.deleter.delete_topics(list(topics)).values():
            # The loop by hand has no dead letters.
            if (fault := deleted.exception()) is not None and "UNKNOWN_TOPIC" not in str(fault):
                raise fault


def _app(target: str) -> str:
    """A name that nobody had before: a transform renamed on a topic would be refused."""
    return f"bench-{target.rpartition('.')[2]}"


def _dead_letters(target: str) -> str:
    return f"{_app(target)}.booking.dlt"


def _account(n: int) -> str:
    return f"account-{n % KEYS}"


def _trace(n: int) -> bytes:
    return b"00-%032x-%016x-01" % (n + 1, n + 1)


def _headers_of(n: int, target: str, found: dict[str, Any]) -> dict[str, Any]:
    """What the headers of output `n` must be, given the two that may differ: id and time."""
    identity = str(uuid.UUID(bytes(found["ce_id"]).decode())).encode()
    assert len(found["ce_time"]) in {25, 32}
    return {
        "ce_specversion": b"1.0",
        "ce_id": identity,
        "ce_source": _app(target).encode(),
        "ce_type": b"Booked",
        "ce_time": found["ce_time"],
        "content-type": b"application/json",
        "message-id": identity,
        "traceparent": _trace(n),
    }


def _rate(times: list[int]) -> float:
    """Messages per second between the first tenth and the last tenth of the appends."""
    times.sort()
    start, end = times[len(times) // 10], times[len(times) * 9 // 10]
    return sum(start < when <= end for when in times) / (end - start) * 1000


def compare(bench: Bench, rounds: int, names: list[str]) -> None:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found = bench.round(name)
            results[name].append(found)
            print(
                f"round {number + 1}  {name:<18} {found['rate']:8.0f} messages/s {found['cpu']:6.1f} us CPU/message"
                f" {found['rss']:5.0f} MiB {found['transactions']:4.0f} transactions",
                flush=True,
            )
    print(f"\n{'contender':<18} median/s   ratio to hand: median (lowest - highest)   us CPU/message, ratio to hand")
    for name in names:
        ratios = _ratios([one["rate"] for one in results[name]], [one["rate"] for one in results["hand"]])
        cost = [one["cpu"] for one in results[name]]
        saved = _ratios([one["cpu"] for one in results["hand"]], cost)
        print(
            f"{name:<18} {statistics.median(one['rate'] for one in results[name]):8.0f}   "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            f"{'':26}{statistics.median(cost):6.1f}   {statistics.median(saved):.2f}"
        )


def _ratios(ours: list[float], hand: list[float]) -> list[float]:
    return [one / other for one, other in zip(ours, hand, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), help="contenders; `hand` must be one of them")
    parser.add_argument("--memory", action="store_true", help="instead: peak memory with this backlog and a small one")
    for internal in ("--transform", "--source", "--target"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.transform:
        transform(options.transform, options.source, options.target)
    elif options.memory:
        for backlog in (100_000, options.messages):
            bench = Bench(backlog)
            found = bench.round("transform/batch")
            bench.delete(bench.source)
            print(f"backlog of {backlog:>9}: peak {found['rss']:.0f} MiB", flush=True)
    else:
        bench = Bench(options.messages)
        try:
            compare(bench, options.rounds, options.only)
        finally:
            bench.delete(bench.source)


if __name__ == "__main__":
    main()
