"""What is sent to the application under test: the same records, in the same order, in every run."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eoframework.app import App
from eoframework.clock import now
from eoframework.cloudevents import MESSAGE_ID
from eoframework.crashtest.load_generated import Payloads
from eoframework.errors import ConfigurationError, DecodeError, EncodeError
from eoframework.kafka.producer import Outgoing
from eoframework.message import Headers, OutboxMessage, Record
from eoframework.topic import Topic
from eoframework.transform.outputs import outgoing

# A producer that is not idempotent sends some messages twice, under one id.
_TWICE = 0.1
_SENDER = "eo-crashtest"


@dataclass(frozen=True, slots=True)
class Sending:
    """One record of the load."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: Headers
    partition: int = -1
    """-1: its key decides."""

    def outgoing(self) -> Outgoing:
        return Outgoing(self.topic, self.key, self.value, list(self.headers), self.partition)

    def to_json(self) -> dict[str, Any]:
        """Bytes as base64, for the file in which it goes from one process to another."""
        return {
            "topic": self.topic,
            "key": _text(self.key),
            "value": _text(self.value),
            "headers": [[name, _text(value)] for name, value in self.headers],
            "partition": self.partition,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Sending:
        headers = tuple((name, _bytes(value)) for name, value in document["headers"])
        return cls(
            document["topic"], _bytes(document["key"]), _bytes(document["value"]), headers, document["partition"]
        )

    def __str__(self) -> str:
        """A line of a `--sample` file, where the payload is JSON."""
        try:
            payload = None if self.value is None else json.loads(self.value)
        except ValueError:
            payload = repr(self.value)
        line = {"topic": self.topic, "payload": payload}
        if self.key is not None:
            line["key"] = self.key.decode(errors="replace")
        identity = dict(self.headers).get(MESSAGE_ID)
        if identity is not None:
            line["id"] = identity.decode(errors="replace")
        return json.dumps(line, ensure_ascii=False)


def of_message(message: OutboxMessage) -> Sending:
    """As the relay would send it."""
    made = outgoing(message, key=message.key)
    headers = tuple((name, value.encode() if isinstance(value, str) else value) for name, value in made.headers)
    return Sending(made.topic, made.key, made.value, headers)


def of_record(record: Record) -> Sending:
    """As it was recorded, in the partition it was recorded in."""
    return Sending(record.topic, record.key, record.value, record.headers, record.partition)


def generated(topics: Sequence[Topic[Any]], *, messages: int, seed: int) -> list[Sending]:
    """So many messages for these topics, and some of them a second time. Raises NotGenerable."""
    dice = random.Random(seed)
    makers = [(topic, Payloads(topic, seed=seed)) for topic in topics]
    load: list[Sending] = []
    for number in range(messages):
        topic, payloads = makers[number % len(makers)]
        identity = None if topic.has_id else payloads.identity()
        load.append(of_message(topic.encode(payloads.make(), source=_SENDER, id=identity)))
        if dice.random() < _TWICE:
            load.append(dice.choice(load[-5:]))
    return load


def of_sample(app: App, topics: Sequence[Topic[Any]], file: Path) -> list[Sending]:
    """The messages of a file, one JSON document a line. Raises ConfigurationError with the line's number."""
    load = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}.", remedy="Give a file of lines of JSON.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            load.append(_of_line(app, topics, line))
        except (ValueError, KeyError, DecodeError, EncodeError, ConfigurationError) as error:
            raise ConfigurationError(
                f"{file}, line {number}: {type(error).__name__}: {error}",
                remedy='Write {"topic": ..., "payload": ..., "key": ..., "id": ...}; key and id may be left out, and '
                "where there is one topic, the payload alone will do.",
            ) from error
    if not load:
        raise ConfigurationError(f"{file} has no messages.")
    return load


def _of_line(app: App, topics: Sequence[Topic[Any]], line: str) -> Sending:
    document = json.loads(line)
    whole = isinstance(document, dict) and "payload" in document and set(document) <= _FIELDS
    if not whole:
        if len(topics) != 1:
            raise ValueError(f"for which topic: {', '.join(topic.name for topic in topics)}?")
        document = {"payload": document}
    names = {topic.name: topic for topic in (*app.topics, *topics)}
    name = document.get("topic", topics[0].name)
    if name not in names:
        raise ValueError(f"the app has no topic {name!r}")
    value = json.dumps(document["payload"]).encode()
    record = Record(name, 0, 0, None, None if document["payload"] is None else value, (), int(now().timestamp()))
    payload = names[name].decode_payload(record)
    return of_message(
        names[name].encode(
            payload, source=_SENDER, key=document.get("key"), id=document.get("id"), headers=document.get("headers")
        )
    )


def keys_of(load: Iterable[Sending]) -> frozenset[str]:
    """The keys, as text: a column that holds one of them in each row tells whose row it is."""
    return frozenset(one.key.decode(errors="replace") for one in load if one.key is not None)


_FIELDS = {"topic", "payload", "key", "id", "headers"}


def _text(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()


def _bytes(value: str | None) -> bytes | None:
    return None if value is None else base64.b64decode(value)
