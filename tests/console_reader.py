"""Topics as the broker's own console consumer shows them: a reader that shares no line with us, nor with librdkafka.

It takes three seconds: once for a scenario, at its end.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from eoframework.dev import cache, jars, java

MAIN = "org.apache.kafka.tools.consumer.ConsoleConsumer"
LIST = Path(__file__).with_name("console-jars.txt")
"""Not part of kafka-jars.txt: nobody who runs a broker needs it."""

Isolation = Literal["read_committed", "read_uncommitted"]

# Control characters, which no payload of the tests contains unescaped.
_FIELD, _RECORD, _HEADER, _NULL = "\x1f", "\x1e", "\x1d", "\x1c"
_IDLE_MS = 1500
_IDLE_MS_IN_DOUBT = 15_000
_LONGEST = 120.0


@dataclass(frozen=True, slots=True)
class ConsoleRecord:
    """One line of the console consumer; what is not UTF-8 is shown with replacement characters."""

    partition: int
    offset: int
    key: str | None
    value: str | None
    headers: dict[str, str]


def console_read(
    bootstrap_servers: str, topic: str, *, isolation: Isolation = "read_committed", at_least: int = 0
) -> list[ConsoleRecord]:
    """Every record of the topic, ordered by partition and offset.

    at_least: how many are expected. The tool ends when nothing came for a while, which on a busy machine may be before
    the first record came; with fewer it is asked again, with more patience.
    """
    found = _read(bootstrap_servers, topic, isolation, _IDLE_MS)
    if len(found) < at_least:
        found = _read(bootstrap_servers, topic, isolation, _IDLE_MS_IN_DOUBT)
    return sorted(found, key=lambda record: (record.partition, record.offset))


def _read(bootstrap_servers: str, topic: str, isolation: Isolation, idle_ms: int) -> list[ConsoleRecord]:
    shown = {
        **dict.fromkeys(("print.partition", "print.offset", "print.headers", "print.key", "print.value"), "true"),
        "key.separator": _FIELD,
        "line.separator": _RECORD,
        "headers.separator": _HEADER,
        "null.literal": _NULL,
    }
    command = [
        *_tool(),
        *("--bootstrap-server", bootstrap_servers, "--topic", topic, "--from-beginning"),
        *("--isolation-level", isolation, "--timeout-ms", str(idle_ms)),
        # Called --formatter-property from release 4.2 on.
        *(part for name, value in shown.items() for part in ("--property", f"{name}={value}")),
    ]
    done = subprocess.run(command, capture_output=True, check=False, timeout=_LONGEST)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, said
    # It counts what it has printed: a line lost on the way to us would otherwise be a record lost by Kafka.
    records = [_parse(line) for line in done.stdout.decode(errors="replace").split(_RECORD)[:-1]]
    assert f"Processed a total of {len(records)} messages" in said, said
    return records


def _tool() -> list[str]:
    pinned = [*jars.pinned(), *jars.pinned(LIST)]
    directory, repository = cache.directory() / "kafka-jars", cache.maven_repository()
    files = jars.ensure(directory, repository=repository, downloaded=lambda _done, _all: None, jars=pinned)
    # A short life on a shared machine: neither the good compiler nor a thread per processor for the garbage.
    options = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
    return [str(java.find()), *options, "-cp", ":".join(map(str, files)), MAIN]


def _parse(line: str) -> ConsoleRecord:
    partition, offset, headers, key, value = line.split(_FIELD)
    return ConsoleRecord(
        partition=int(partition.removeprefix("Partition:")),
        offset=int(offset.removeprefix("Offset:")),
        key=None if key == _NULL else key,
        value=None if value == _NULL else value,
        headers={} if headers == "NO_HEADERS" else dict(_header(part) for part in headers.split(_HEADER)),
    )


def _header(text: str) -> tuple[str, str]:
    name, _, value = text.partition(":")
    return name, value
