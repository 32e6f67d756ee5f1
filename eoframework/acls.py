"""Which rights on Kafka each process of an app needs: for its topics, groups and transactional ids, and for no others.

Kafka implies DESCRIBE by READ, WRITE, DELETE and ALTER. Nothing is asked of the cluster itself: an idempotent producer
needs no IDEMPOTENT_WRITE since Kafka 2.8 (KIP-679). (Kafka documentation, "Authorization and ACLs".)
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal
from uuid import UUID

from eoframework.app import App
from eoframework.checkpoint import checkpoint_topic
from eoframework.handlers import Handler
from eoframework.transforms import Transform

Process = Literal["run", "relay", "producer", "observer", "operator"]
Resource = Literal["topic", "group", "transactional-id", "cluster"]

_TELLS = "eo run asks at its start whether it exists"
_SETTINGS = "to know its limits and warn of what is unsafe; without it the defaults count"


@dataclass(frozen=True, slots=True)
class Acl:
    """One right of one process."""

    process: Process
    resource: Resource
    name: str
    operation: str
    why: str
    prefixed: bool = False
    """`name` is the beginning of many."""
    optional: bool = False
    """It works without, and says what it does not know."""

    def document(self) -> dict[str, object]:
        """For `--json`."""
        return asdict(self)

    def command(self, principal: str) -> str:
        """What `kafka-acls` has to be told, after its connection options."""
        words = ["--add", "--allow-principal", principal, "--operation", self.operation]
        words += ["--cluster"] if self.resource == "cluster" else [f"--{self.resource}", self.name]
        words += ["--resource-pattern-type", "prefixed"] if self.prefixed else []
        return f"kafka-acls {shlex.join(words)}"


def acls(app: App, *, outbox_id: UUID) -> list[Acl]:
    """All rights, process by process; the same right is listed once a process."""
    found = [*_run(app), *_relay(app, outbox_id), *_producer(app), *_observer(app, outbox_id)]
    found += _operator(app, outbox_id)
    once: dict[tuple[str, str, str, str], Acl] = {}
    for acl in found:
        key = (acl.process, acl.resource, acl.name, acl.operation)
        if key not in once or once[key].optional:
            once[key] = acl
    return list(once.values())


def principal(app: App, process: Process) -> str:
    """The principal that the commands name."""
    return f"User:{app.name}-{process}"


def table(found: Iterable[Acl]) -> str:
    """For people: who, what, on which, why."""
    rows = [
        (
            acl.process,
            acl.operation,
            acl.resource,
            acl.name + ("*" if acl.prefixed else ""),
            f"{'optional: ' if acl.optional else ''}{acl.why}",
        )
        for acl in found
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    return "\n".join("  ".join([*(f"{row[i]:<{widths[i]}}" for i in range(4)), row[4]]).rstrip() for row in rows)


def _run(app: App) -> Iterator[Acl]:
    for handler in app.handlers:
        yield from _source(handler.topic.name, handler.group)
        if handler.dead_letter_topic is not None:
            yield Acl("run", "topic", handler.dead_letter_topic, "DescribeConfigs", _TELLS)
            yield Acl("run", "topic", handler.dead_letter_topic, "Describe", _TELLS)
    for transform in app.transforms:
        yield from _source(transform.topic.name, transform.group)
        for name in _sent_to(transform):
            yield Acl("run", "topic", name, "Write", f"{transform.group} sends to it")
            yield Acl("run", "topic", name, "DescribeConfigs", _TELLS)
        name = f"eo.transform.{transform.group}."
        why = f"the transactions of {transform.group}"
        yield Acl("run", "transactional-id", name, "Write", why, prefixed=True)
        what = "to refuse a session timeout that the brokers would not keep"
        yield Acl("run", "cluster", "kafka-cluster", "DescribeConfigs", what, optional=True)


def _source(topic: str, group: str) -> Iterator[Acl]:
    yield Acl("run", "topic", topic, "Read", f"{group} reads it")
    yield Acl("run", "topic", topic, "DescribeConfigs", _TELLS)
    yield Acl("run", "group", group, "Read", f"{group} is its consumer group")


def _relay(app: App, outbox_id: UUID) -> Iterator[Acl]:
    for name in _published(app):
        yield Acl("relay", "topic", name, "Write", "it may be published to")
        yield Acl("relay", "topic", name, "DescribeConfigs", _SETTINGS, optional=True)
    checkpoints = checkpoint_topic(outbox_id)
    yield Acl("relay", "topic", checkpoints, "Write", "the relay's checkpoints")
    yield Acl("relay", "topic", checkpoints, "Read", "the relay's checkpoints, read after a take-over")
    what = "to refuse a topic that would lose checkpoints; without it that is not verified"
    yield Acl("relay", "topic", checkpoints, "DescribeConfigs", what, optional=True)
    name = f"{checkpoints}."
    yield Acl("relay", "transactional-id", name, "Write", "one for each shard of the outbox", prefixed=True)


def _producer(app: App) -> Iterator[Acl]:
    # app.publish writes to PostgreSQL: a web server that only publishes needs none of these.
    for name in sorted({topic.name for topic in app.topics}):
        yield Acl("producer", "topic", name, "Write", "app.producer sends to it; app.publish needs no right on Kafka")
        yield Acl("producer", "topic", name, "DescribeConfigs", _SETTINGS, optional=True)
    why = "only for app.producer.transaction"
    yield Acl("producer", "transactional-id", "eo.producer.", "Write", why, prefixed=True, optional=True)


def _observer(app: App, outbox_id: UUID) -> Iterator[Acl]:
    for name in _all_topics(app, outbox_id):
        yield Acl("observer", "topic", name, "Describe", "eo topics plan, eo position show")
        yield Acl("observer", "topic", name, "DescribeConfigs", "eo topics plan")
    for transform in app.transforms:
        yield Acl("observer", "group", transform.group, "Describe", "eo position show: its offsets are in Kafka")


def _operator(app: App, outbox_id: UUID) -> Iterator[Acl]:
    for name in _all_topics(app, outbox_id):
        for operation in ("Create", "Describe", "DescribeConfigs", "AlterConfigs"):
            yield Acl("operator", "topic", name, operation, "eo topics apply")
    ones: tuple[Handler | Transform, ...] = (*app.handlers, *app.transforms)
    for one in ones:
        yield Acl("operator", "topic", one.topic.name, "Read", "eo position set, eo reprocess")
        yield Acl("operator", "group", one.group, "Read", "eo position set")
        yield Acl("operator", "group", one.group, "Delete", "eo position forget")
    for name in (*_published(app), checkpoint_topic(outbox_id)):
        yield Acl("operator", "topic", name, "Read", "eo outbox adopt: what of the outbox is there")


def _sent_to(transform: Transform) -> list[str]:
    dead_letters = transform.dead_letter_topic
    return sorted({target.name for target in transform.targets} | ({dead_letters} if dead_letters else set()))


def _published(app: App) -> list[str]:
    """Where outbox rows of the app may go: any of its topics but those that only transforms send to."""
    of_transforms = {target.name for transform in app.transforms for target in transform.targets}
    sources = {handler.topic.name for handler in app.handlers}
    dead_letters = {handler.dead_letter_topic for handler in app.handlers}
    names = ({topic.name for topic in app.topics} - of_transforms) | sources
    return sorted(names | {name for name in dead_letters if name is not None})


def _all_topics(app: App, outbox_id: UUID) -> list[str]:
    ones: tuple[Handler | Transform, ...] = (*app.handlers, *app.transforms)
    dead_letters = {one.dead_letter_topic for one in ones}
    names = {topic.name for topic in app.topics} | {name for name in dead_letters if name is not None}
    return sorted(names | {checkpoint_topic(outbox_id)})
