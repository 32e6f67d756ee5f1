"""What the app's topics should be, how they differ from what is there, and making the difference go away."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import UUID

from eoframework.app import App
from eoframework.checkpoint import checkpoint_topic
from eoframework.kafka.admin import Admin, TopicInfo
from eoframework.topic import Topic

_log = logging.getLogger(__name__)

DEFAULT_PARTITIONS = 6
_ENOUGH_BROKERS = 3

Action = Literal["create", "set", "by hand"]


@dataclass(frozen=True, slots=True)
class WantedTopic:
    """A topic as it should be; None leaves a choice to what is there already."""

    name: str
    partitions: int | None
    replicas: int
    config: Mapping[str, str]
    replicas_asked: bool = False
    partitions_at_least: bool = False


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing to do about one topic."""

    topic: str
    action: Action
    what: str
    config: Mapping[str, str] = field(default_factory=dict)
    partitions: int = 0
    replicas: int = 0

    def document(self) -> dict[str, object]:
        """For `--json`."""
        return {"topic": self.topic, "action": self.action, "what": self.what}


def dead_letter_topics(app: App) -> list[str]:
    """Where the app's handlers and transforms send what they gave up."""
    of_handlers = [handler.dead_letter_topic for handler in app.handlers]
    of_transforms = [transform.dead_letter_topic for transform in app.transforms]
    return [name for name in of_handlers + of_transforms if name is not None]


def wanted_topics(
    topics: Iterable[Topic[Any]],
    *,
    brokers: int,
    outbox: tuple[UUID, int] | None,
    dead_letters: Iterable[str] = (),
) -> list[WantedTopic]:
    """Every topic of the app, those for its dead letters, and with `outbox` = (id, shards) the checkpoint topic."""
    replicas = 3 if brokers >= _ENOUGH_BROKERS else 1
    by_name: dict[str, Topic[Any]] = {}
    for topic in topics:
        # One topic may be declared in several modules; the declaration that says most about it counts.
        if topic.name not in by_name or topic.partitions is not None:
            by_name[topic.name] = topic
    wanted = [_wanted(topic, replicas) for _, topic in sorted(by_name.items())]
    wanted += [WantedTopic(name, None, replicas, _durable(replicas)) for name in dead_letters if name not in by_name]
    if outbox is not None:
        outbox_id, shards = outbox
        # Compacted only: with a time limit the last checkpoint of a quiet shard would vanish, and nobody could tell
        # any more whether its last batch had been published.
        config = {"cleanup.policy": "compact"} | _durable(replicas)
        name = checkpoint_topic(outbox_id)
        wanted.append(WantedTopic(name, shards, replicas, config, partitions_at_least=True))
    return wanted


def differences(wanted: Iterable[WantedTopic], admin: Admin) -> list[Difference]:
    """What `apply` would do, and what only a person can; changes nothing. Raises NotAuthorized, Retryable."""
    wanted = list(wanted)
    existing = admin.existing([topic.name for topic in wanted])
    found: list[Difference] = []
    for topic in wanted:
        info = existing.get(topic.name)
        found += [_creation(topic)] if info is None else _changes(topic, info)
    return found


def apply(differences_found: Iterable[Difference], admin: Admin) -> None:
    """Create and set; leaves alone what only a person can change. Stopped halfway: run it again, it does the rest."""
    for difference in differences_found:
        if difference.action == "create":
            admin.create(
                difference.topic,
                partitions=difference.partitions,
                replicas=difference.replicas,
                config=difference.config,
            )
        elif difference.action == "set":
            admin.set_config(difference.topic, difference.config)


def warn_of_few_brokers(brokers: int) -> None:
    """Say what one replica means."""
    if brokers < _ENOUGH_BROKERS:
        _log.warning(
            "the cluster has %d broker(s): new topics get one replica; a lost disk loses their messages.",
            brokers,
        )


def _wanted(topic: Topic[Any], default_replicas: int) -> WantedTopic:
    replicas = topic.replication_factor or default_replicas
    config = _durable(replicas) | dict(topic.config)
    return WantedTopic(
        topic.name, topic.partitions, replicas, config, replicas_asked=topic.replication_factor is not None
    )


def _durable(replicas: int) -> dict[str, str]:
    # acks=all means all replicas in sync, which may be the leader alone: min.insync.replicas makes it mean two. An
    # unclean leader has not seen the last records; they would be gone although acknowledged.
    config = {"unclean.leader.election.enable": "false"}
    return config | {"min.insync.replicas": "2"} if replicas >= _ENOUGH_BROKERS else config


def _creation(topic: WantedTopic) -> Difference:
    partitions = topic.partitions or DEFAULT_PARTITIONS
    settings = ", ".join(f"{name}={value}" for name, value in sorted(topic.config.items()))
    what = f"{partitions} partitions, {topic.replicas} replica(s), {settings}"
    return Difference(topic.name, "create", what, topic.config, partitions, topic.replicas)


def _changes(topic: WantedTopic, info: TopicInfo) -> list[Difference]:
    found = []
    if topic.partitions is not None and _partitions_differ(topic, info):
        found.append(
            Difference(
                topic.name,
                "by hand",
                f"partitions {info.partitions} -> {topic.partitions}: keys would move to other partitions and lose "
                "their order; drain it first, then use kafka-topics --alter",
            )
        )
    if info.replicas < topic.replicas or (topic.replicas_asked and info.replicas != topic.replicas):
        what = f"replicas {info.replicas} -> {topic.replicas}: use kafka-reassign-partitions"
        found.append(Difference(topic.name, "by hand", what))
    changed = {name: value for name, value in topic.config.items() if info.config.get(name) != value}
    if int(changed.get("min.insync.replicas", "0")) > info.replicas:
        # More than there are replicas, and nobody could write to the topic any more.
        del changed["min.insync.replicas"]
    if changed:
        what = ", ".join(f"{name} {info.config.get(name)} -> {value}" for name, value in sorted(changed.items()))
        found.append(Difference(topic.name, "set", what, changed))
    return found


def _partitions_differ(topic: WantedTopic, info: TopicInfo) -> bool:
    wanted = topic.partitions or 0
    return info.partitions < wanted if topic.partitions_at_least else info.partitions != wanted
