"""What Kafka answers to questions about topics and groups, by what is to be done about it."""

from __future__ import annotations

from confluent_kafka import KafkaError

from eoframework.errors import ConfigurationError, EoError, Retryable
from eoframework.kafka.faults import classify

_UNKNOWN = frozenset({KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION})
_INVALID = frozenset(
    {
        KafkaError.INVALID_REPLICATION_FACTOR,
        KafkaError.INVALID_PARTITIONS,
        KafkaError.INVALID_CONFIG,
        KafkaError.POLICY_VIOLATION,
    }
)
REFUSED_LOGIN = frozenset({KafkaError._AUTHENTICATION, KafkaError.SASL_AUTHENTICATION_FAILED})
FORBIDDEN = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
    }
)


class UnknownTopic(ConfigurationError):
    """The topic does not exist; a restart will not make it."""


class NotAuthorized(ConfigurationError):
    """Kafka refused the login, or the right to do this."""


def meaning(error: KafkaError, what: str, *, topic: str | None, servers: str) -> EoError:
    """The error of our tree for the answer to a question, or for none."""
    if topic is not None and error.code() in _UNKNOWN:
        return UnknownTopic(f"Kafka at {servers} has no topic {topic!r}.", remedy="Run: eo topics apply MODULE:APP")
    if error.code() in FORBIDDEN or error.code() in REFUSED_LOGIN:
        return NotAuthorized(
            f"{what}: Kafka at {servers} refuses: {error.str()}.",
            remedy="Grant the right to this principal (kafka-acls), or use another one (EO_KAFKA_SASL_*).",
        )
    if error.code() in _INVALID:
        return ConfigurationError(f"{what}: Kafka refuses: {error.str()}.", remedy="Correct Topic(...).")
    if error.code() == KafkaError._NOENT:
        # "No leaders found": one is being chosen. Also of a topic that is not there, or forbidden: Admin asks for that.
        return Retryable(f"{what}: {error.str()}.")
    return classify(error, what)
