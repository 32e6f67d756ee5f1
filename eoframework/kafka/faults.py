"""Kafka errors, classified once, by what the caller must do."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException

from eoframework.errors import Abortable, EoError, Fenced, Permanent, RestartNeeded, Retryable

# Someone else runs under our transactional.id or our group membership: nothing we send counts any more.
_FENCED = frozenset(
    {
        KafkaError._FENCED,
        KafkaError.INVALID_PRODUCER_EPOCH,
        KafkaError.FENCED_INSTANCE_ID,
        KafkaError.PRODUCER_FENCED,
    }
)
# The network, the broker's state of the moment, or a full local queue: nothing is wrong with the request.
_PASSING = frozenset(
    {
        KafkaError._TRANSPORT,
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._TIMED_OUT,
        KafkaError._TIMED_OUT_QUEUE,
        KafkaError._MSG_TIMED_OUT,
        KafkaError._RESOLVE,
        KafkaError._WAIT_COORD,
        KafkaError._QUEUE_FULL,
        KafkaError._PURGE_QUEUE,
        KafkaError._PURGE_INFLIGHT,
        KafkaError._DESTROY,
        # The broker asked has left the cluster's metadata, dead or frozen for long enough: the client drops it and with
        # it every question that it has not answered.
        KafkaError._DESTROY_BROKER,
        KafkaError._RETRY,
        KafkaError._NO_OFFSET,
        KafkaError._IN_PROGRESS,
        KafkaError._PREV_IN_PROGRESS,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
        KafkaError.CONCURRENT_TRANSACTIONS,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.REQUEST_TIMED_OUT,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.NOT_ENOUGH_REPLICAS,
        KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND,
        KafkaError.REBALANCE_IN_PROGRESS,
        # A broker that has just taken over, and does not know yet what it may show.
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.KAFKA_STORAGE_ERROR,
        KafkaError.UNSTABLE_OFFSET_COMMIT,
        KafkaError.NOT_CONTROLLER,
        KafkaError.THROTTLING_QUOTA_EXCEEDED,
    }
)
_TOPIC_TROUBLE = frozenset(
    {
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
    }
)


def classify(fault: KafkaError | KafkaException, what: str) -> EoError:
    """The error of our tree that says what to do about a Kafka error.

    Order matters: `fatal` outranks `requires abort`, which outranks `retriable` (the rule librdkafka itself states).
    """
    error = kafka_error(fault)
    text = f"{what}: {error.name()}: {error.str()}."
    if error.code() in _FENCED:
        return Fenced(text)
    if error.fatal():
        return RestartNeeded(text)
    if error.txn_requires_abort():
        return Abortable(text)
    if error.retriable() or error.code() in _PASSING:
        return Retryable(text)
    return Permanent(text)


def is_topic_trouble(fault: KafkaError | KafkaException) -> bool:
    """Whether the topic is missing or forbidden: a state of the cluster that a person mends, not a bad message."""
    return kafka_error(fault).code() in _TOPIC_TROUBLE


def kafka_error(fault: KafkaError | KafkaException) -> KafkaError:
    """The KafkaError inside whatever the client handed over.

    Some calls raise a bare `KafkaError`, which is no `Exception` in every release, others wrap it in KafkaException.
    """
    if isinstance(fault, KafkaError):
        return fault
    inner = fault.args[0] if fault.args else None
    return inner if isinstance(inner, KafkaError) else KafkaError(KafkaError._FAIL, str(fault))
