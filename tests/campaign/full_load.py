"""What the harness sends: entries by a plain idempotent producer, some twice, and some in aborted transactions."""

from __future__ import annotations

import json
import random

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from tests.campaign import ledger_rules as rules
from tests.campaign.history import History

_CONFIG = {"linger.ms": 1, "reconnect.backoff.max.ms": 500, "socket.timeout.ms": 3000, "log_level": 0}
_REPEATED = 0.08
_FLUSH = 30.0


class Load:
    """Numbered entries; each chunk is in the history before it is sent, and what became of it when that is known."""

    def __init__(self, servers: str, topic: str, history: History, chance: random.Random, *, keys: int) -> None:
        self._topic, self._history, self._chance, self._keys = topic, history, chance, keys
        self._producer = Producer({"bootstrap.servers": servers, "enable.idempotence": True, **_CONFIG})
        self._servers = servers
        self._ghosts: Producer | None = None
        self.sent = 0
        self._ghost = rules.GHOSTS
        self._under_way: dict[int, _Chunk] = {}

    def send(self, count: int) -> None:
        """So many new entries, and now and then an old one again, by the id it had."""
        messages = []
        for n in range(self.sent, self.sent + count):
            messages.append(n)
            if n and self._chance.random() < _REPEATED:
                again = self._chance.randrange(max(0, n - 300), n)
                messages += [again] if rules.has_id(again) else []
        self.sent += count
        chunk = _Chunk(set(messages))
        self._under_way[self._history.begin("send", messages=messages)] = chunk
        for n in messages:
            self._produce(self._producer, n, chunk)
        self.look()

    def abort_some(self, count: int = 3) -> None:
        """Entries in a transaction that is aborted."""
        messages = list(range(self._ghost, self._ghost + count))
        self._ghost += count
        number = self._history.begin("abort", messages=messages)
        try:
            producer = self._ghosts or self._open_ghosts()
            producer.begin_transaction()
            for n in messages:
                self._produce(producer, n, _Chunk(set()))
            producer.flush(5)
            producer.abort_transaction(20)
            self._ghosts = producer
        except KafkaException:
            # Kafka aborts it sooner or later: it was never asked to commit. A new client for the next one.
            self._ghosts = None
        self._history.end(number, "fail")

    def _open_ghosts(self) -> Producer:
        told = {"transactional.id": f"{self._topic}.ghosts", "bootstrap.servers": self._servers}
        producer = Producer({**told, **_CONFIG, "transaction.timeout.ms": 10_000})
        producer.init_transactions(20)
        return producer

    def look(self) -> None:
        """Note what was confirmed meanwhile."""
        self._producer.poll(0)
        for number in [number for number, chunk in self._under_way.items() if not chunk.waiting]:
            self._end(number)

    def finish(self) -> None:
        """Wait for every confirmation; what has none is unknown."""
        self._producer.flush(_FLUSH)
        for number in list(self._under_way):
            self._end(number)

    def _end(self, number: int) -> None:
        chunk = self._under_way.pop(number)
        unknown = sorted(chunk.waiting | chunk.failed)
        self._history.end(number, "ok", **({"unknown": unknown} if unknown else {}))

    def _produce(self, producer: Producer, n: int, chunk: _Chunk) -> None:
        key = rules.key_of(n, self._keys)
        value = json.dumps({"key": key, "n": n}).encode()
        headers: list[tuple[str, str | bytes | None]] = [("message-id", rules.message_id(n))] if rules.has_id(n) else []
        producer.produce(self._topic, value, key.encode(), headers=headers, on_delivery=chunk.noting(n))


class _Chunk:
    """Entries that were sent together, and those of which nothing is known yet."""

    def __init__(self, waiting: set[int]) -> None:
        self.waiting = waiting
        self.failed: set[int] = set()

    def noting(self, n: int):  # type: ignore[no-untyped-def] # confluent's type is not exported
        def note(error: KafkaError | None, _: Message) -> None:
            self.waiting.discard(n)
            if error is not None:
                self.failed.add(n)

        return note
