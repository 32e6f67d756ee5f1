"""What the fixture `eo_crash` is: an app's own processes, killed at each point of their flow and started again."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from eoframework.crashtest.findings import Report
from eoframework.crashtest.load import Sending, of_message
from eoframework.crashtest.user_question import Question, crash_test, refuse_what_cannot_be
from eoframework.crashtest.user_stage import Stage
from eoframework.topic import Topic

Given = tuple[Topic[Any], Any]
"""A topic and a payload of it."""


class CrashTests:
    """Runs crash tests; the first one starts a Kafka broker and a PostgreSQL server, which stay for all of them.

    On a crash of the test's process: the services, and the app's processes, end with it.
    """

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._stack = ExitStack()
        self._stage: Stage | None = None

    def __enter__(self) -> CrashTests:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def __call__(
        self,
        reference: str,
        *messages: Given,
        generate: int = 20,
        handlers: Sequence[str] = (),
        metadata: str = "",
        setup: str = "",
        migrate: str = "",
        points: Sequence[str] = (),
        allow: Sequence[str] = (),
        seed: int = 0,
        minutes: float | None = None,
    ) -> Report:
        """Kill the app at each point of its flow; raises AssertionError unless it comes to what it does without.

        reference: `module:app`; its own processes import it. messages: (topic, payload) each, in their order; without
        any, `generate` of them are made. metadata, setup, migrate: how its tables are made (`module:Base.metadata`,
        `module:function`, a command). points: events or flows, default all; each takes seconds. allow: variables,
        addresses and statements that handlers may touch. Raises ConfigurationError with what is missing.
        """
        question = Question(
            reference=reference,
            handlers=tuple(handlers),
            metadata=metadata,
            setup=setup,
            migrate=migrate,
            messages=generate,
            seed=seed,
            minutes=minutes,
            points=tuple(points),
            allowed=tuple(allow),
        )
        if self._stage is None:
            refuse_what_cannot_be(question, path=_path(), given=bool(messages))
        report = crash_test(question, self.stage(), given=_load(messages), say=_say)
        if not report.clean:
            raise AssertionError(f"{reference} does not do the same when it is killed:\n{report.text()}")
        return report

    def stage(self) -> Stage:
        """The services; the first call starts them."""
        if self._stage is None:
            self._stage = self._stack.enter_context(Stage(path=_path()))
        return self._stage


def _path() -> str:
    # The app's processes find what this one finds.
    return os.pathsep.join(entry for entry in sys.path if entry)


def _load(messages: Sequence[Given]) -> list[Sending]:
    return [of_message(topic.encode(payload, source="test")) for topic, payload in messages]


def _say(text: str) -> None:
    # pytest shows it with a test that fails.
    sys.stderr.write(f"{text}\n")
