"""One run of the application: its processes work the load off, and perhaps one of them is killed on the way."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from eoframework import clock
from eoframework.crashtest.load import Sending
from eoframework.crashtest.state import State, read_state
from eoframework.crashtest.user_nursery import Nursery
from eoframework.crashtest.user_stage import Scene, Stage
from eoframework.db import contents
from eoframework.errors import Retryable
from eoframework.kafka.scratch import holds_records, send_all

Role = Literal["run", "relay"]

DRAIN_SECONDS = 60.0
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_LOOK = 0.1
# Transactions leave marks behind the last record of a partition.
_MARKS = 50
_SPEED = {
    "EO_LOG_LEVEL": "info",
    "EO_LOG_FORMAT": "text",
    "EO_INSTANCE": "crashtest",
    "EO_RELAY_LEASE": "1",
    "EO_RELAY_BATCH": "20",
    "EO_TRANSFORM_BATCH": "10",
    # Below the broker's session timeout, which is short here.
    "EO_TRANSFORM_TRANSACTION_TIMEOUT": "2",
    "EO_TRANSFORM_MESSAGE_TIMEOUT": "1.5",
    "EO_OFFSET_COMMIT_INTERVAL": "0.2",
}


@dataclass(frozen=True, slots=True)
class Consumer:
    """A handler or transform of the application."""

    name: str
    group: str
    topic: str
    transform: bool


@dataclass(frozen=True)
class UserApp:
    """What is known of the application without importing it."""

    reference: str
    name: str
    consumers: tuple[Consumer, ...]
    topics: Mapping[str, int]
    publishes: bool = True
    """Whether anything has to be relayed."""

    @property
    def groups(self) -> list[str]:
        return [one.group for one in self.consumers]


@dataclass(slots=True)
class Result:
    """What came of a run."""

    state: State
    hits: dict[Role, dict[str, int]] = field(default_factory=dict)
    """How often each event was passed, in a run that was watched."""
    told: list[dict[str, Any]] = field(default_factory=list)
    """What handlers did besides, in a run that was watched."""
    died: bool = False
    """Whether the armed process was killed at its point."""
    trouble: str = ""
    """Why the run did not come to its end; empty when it did."""
    batch: int = 0


class Child:
    """One process of the application."""

    def __init__(
        self,
        nursery: Nursery,
        app: UserApp,
        role: Role,
        scene: Scene,
        directory: Path,
        *,
        crash_at: str = "",
        watched: bool = False,
    ) -> None:
        self.role = role
        self.report = directory / f"{role}.{len(list(directory.iterdir()))}.report"
        self.log = directory / f"{role}.log"
        self._nursery = nursery
        self._ended: int | None = None
        arguments = [role, app.reference, "--no-wait"]
        if role == "run":
            arguments += [part for one in app.consumers for part in ("--handler", one.name)]
        armed = {"EO_CRASH_AT": crash_at} if crash_at else {}
        self._pid = nursery.spawn(
            ["watched" if watched else "eo", str(self.report), app.reference, *arguments],
            environment={**scene.environment, **armed},
            log=self.log,
        )

    @property
    def ended(self) -> int | None:
        """How it ended; None while it runs."""
        if self._ended is None:
            self._ended = self._nursery.ended(self._pid)
        return self._ended

    def stop(self) -> int:
        """SIGTERM, and SIGKILL where that is not enough."""
        if self.ended is None:
            os.kill(self._pid, signal.SIGTERM)
        deadline = clock.monotonic() + _STOP_SECONDS
        while self.ended is None and clock.monotonic() < deadline:
            clock.sleep(_LOOK / 5)
        return self.kill()

    def kill(self) -> int:
        """SIGKILL, if it still runs."""
        if self.ended is None:
            os.kill(self._pid, signal.SIGKILL)
        while (code := self.ended) is None:
            clock.sleep(_LOOK / 5)
        return code

    def told(self) -> list[dict[str, Any]]:
        """What it has written down."""
        if not self.report.exists():
            return []
        return [json.loads(line) for line in self.report.read_text().splitlines()]

    def claims(self) -> int:
        """How many partitions, or shards, it has made its own."""
        return len({(one["who"], one["what"]) for one in self.told() if one["kind"] == "claimed"})

    def tail(self) -> str:
        """The end of what it has said."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


class Run:
    """One run; `go` may be called once."""

    def __init__(self, stage: Stage, app: UserApp, load: Sequence[Sending], *, batch: int) -> None:
        """batch: EO_MAX_BATCH."""
        self._stage = stage
        self._app = app
        self._load = load
        self._batch = batch
        self._children: dict[Role, Child] = {}

    def go(self, *, crash: tuple[Role, str] | None = None, watched: bool = False, ahead: int = 0) -> Result:
        """Everything to its end. crash: which process is killed at which point, and started again then.

        ahead: so far ahead its sequences begin, which shows what comes from them.
        """
        topics = {name: max(partitions, *self._needed(name)) for name, partitions in self._app.topics.items()}
        with self._stage.scene(topics, self._app.groups) as scene:
            if ahead:
                with scene.database.begin("moving the sequences on") as connection:
                    contents.advance_sequences(connection, scene.database.schema, by=ahead)
            send_all(scene.settings, [sending.outgoing() for sending in self._load])
            mark = self._stage.server_log.stat().st_size
            environment = {**scene.environment, **_SPEED, "EO_MAX_BATCH": str(self._batch)}
            result = self._run(Scene(**{**vars(scene), "environment": environment}), crash, watched=watched)
            result.state = read_state(scene, self._stage.server_log, since=mark)
            result.batch = self._batch
        return result

    def _needed(self, topic: str) -> list[int]:
        return [1, *(sending.partition + 1 for sending in self._load if sending.topic == topic)]

    def _run(self, scene: Scene, crash: tuple[Role, str] | None, *, watched: bool) -> Result:
        result = Result(State())
        roles: list[Role] = ["run", "relay"] if self._app.publishes else ["run"]
        directory = self._stage.directory / scene.name
        directory.mkdir()
        try:
            for role in roles:
                at = crash[1] if crash is not None and crash[0] == role else ""
                self._children[role] = Child(
                    self._stage.nursery, self._app, role, scene, directory, crash_at=at, watched=watched
                )
            self._work(scene, directory, crash, result)
            for role, child in self._children.items():
                code = child.stop()
                if code and not result.trouble:
                    result.trouble = f"eo {role} ended with {code}:\n{child.tail()}"
        finally:
            for child in self._children.values():
                child.kill()
        for role, child in self._children.items():
            for one in child.told():
                if one["kind"] == "hits":
                    result.hits[role] = one["hits"]
                elif one["kind"] != "claimed":
                    result.told.append(one)
        return result

    def _work(self, scene: Scene, directory: Path, crash: tuple[Role, str] | None, result: Result) -> None:
        """Wait until all is done; whoever was killed at its point is started again."""
        armed = crash[0] if crash is not None else None
        deadline = clock.monotonic() + _START_SECONDS + DRAIN_SECONDS
        while clock.monotonic() < deadline:
            for role, child in list(self._children.items()):
                if child.ended is None:
                    continue
                if role != armed or child.ended != -signal.SIGKILL or result.died:
                    result.trouble = f"eo {role} ended by itself with {child.ended}:\n{child.tail()}"
                    return
                result.died = True
                self._children[role] = Child(self._stage.nursery, self._app, role, scene, directory)
                deadline = clock.monotonic() + DRAIN_SECONDS
            if (
                self._is_taken_over(scene)
                and self._is_done(scene)
                and self._ended_well(armed, scene, directory, result)
            ):
                return
            clock.sleep(_LOOK)
        tails = "\n".join(child.tail()[-1500:] for child in self._children.values())
        result.trouble = f"not done within {DRAIN_SECONDS:.0f} s:\n{tails}"

    def _ended_well(self, armed: Role | None, scene: Scene, directory: Path, result: Result) -> bool:
        """All is done. Whoever should have been killed and was not may have its point in its end."""
        if armed is None or result.died:
            return True
        if self._children[armed].stop() != -signal.SIGKILL:
            return True
        result.died = True
        self._children[armed] = Child(self._stage.nursery, self._app, armed, scene, directory)
        return False

    # --- is everything done? ---

    def _is_taken_over(self, scene: Scene) -> bool:
        """Whether all has an owner that lives: what was killed may have left everything done, but nothing settled."""
        wanted = {"run": sum(scene.topics[one.topic] for one in self._app.consumers), "relay": scene.shards}
        return all(child.claims() >= wanted[role] for role, child in self._children.items())

    def _is_done(self, scene: Scene) -> bool:
        try:
            with scene.database.begin("looking whether all is done") as connection:
                if contents.waiting(connection, scene.database.schema):
                    return False
                handled = contents.stands(connection, scene.database.schema)
            # In this order: what is published now leaves the outbox only after it is in its topic.
            return all(self._at_end(scene, consumer, handled) for consumer in self._app.consumers)
        except Retryable:
            return False

    def _at_end(self, scene: Scene, consumer: Consumer, handled: Mapping[tuple[str, str, int], int]) -> bool:
        offsets: dict[int, int] = {}
        if consumer.transform:
            found = scene.admin.group_offsets(consumer.group, consumer.topic)
            offsets = {partition: offset for partition, (offset, _) in found.items()}
        for partition in range(scene.topics[consumer.topic]):
            stands = handled.get((consumer.group, consumer.topic, partition), offsets.get(partition))
            low, high = scene.admin.watermarks(consumer.topic, partition)
            if stands is None:
                # A transform's group has no offset where there was nothing; a handler has a row everywhere.
                if not consumer.transform or high > low:
                    return False
            elif stands < high and (
                high - stands > _MARKS or holds_records(scene.settings, consumer.topic, partition, stands, high)
            ):
                return False
        return True
