"""What became of one record: Kafka's report about it, as a place in the log or an error that says what to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from uuid import UUID

from confluent_kafka import KafkaError, KafkaException, Message

from eoframework.errors import EncodeError, EoError, OutcomeUnknown, Retryable
from eoframework.kafka.answers import NotAuthorized, UnknownTopic
from eoframework.kafka.destinations import Destination
from eoframework.kafka.faults import kafka_error

_TOO_LARGE = frozenset({KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE})
# Only these are about a record itself. Any other code, known or new, is taken for the client's or the cluster's
# trouble: were it taken for the record's, a broken client would fill the dead letters with innocent messages.
OF_THE_RECORD = _TOO_LARGE | {
    KafkaError.INVALID_RECORD,
    KafkaError.INVALID_TIMESTAMP,
    KafkaError.POLICY_VIOLATION,
    KafkaError.UNSUPPORTED_FOR_MESSAGE_FORMAT,
    KafkaError.TOPIC_EXCEPTION,
    KafkaError._INVALID_ARG,
    KafkaError._BAD_MSG,
}
_UNKNOWN_TOPIC = frozenset({KafkaError._UNKNOWN_TOPIC, KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_PARTITION})
_FORBIDDEN = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED})


class Ticket(ABC):
    """One message on its way; told once what became of it, by whichever thread polls the client."""

    __slots__ = ("destination", "id", "size")

    def __init__(self, id: UUID, destination: Destination, size: int) -> None:  # noqa: A002 - the message's word for it
        """size: bytes of key and value."""
        self.id = id
        self.destination = destination
        self.size = size

    def unconfirmed(self) -> OutcomeUnknown:
        """What to tell a sender who waits no longer."""
        topic = self.destination.topic
        what = f"{topic}: message {self.id} was not confirmed in time; it may be written, now or later."
        return OutcomeUnknown(what, ids=(self.id,), topics=(topic,))

    @abstractmethod
    def delivered(self, partition: int, offset: int, timestamp: int) -> None:
        """All in-sync replicas hold it. timestamp: milliseconds since the epoch."""

    @abstractmethod
    def failed(self, error: EoError) -> None:
        """Kafka does not hold it, or, with OutcomeUnknown, may."""


def report(ticket: Ticket, error: KafkaError | None, message: Message) -> None:
    """librdkafka's delivery report of a ticket's record."""
    if error is None:
        # None only where there is no such thing, which is not so in a report of success.
        ticket.delivered(message.partition() or 0, message.offset() or 0, message.timestamp()[1])
    else:
        ticket.failed(delivery_error(error, ticket))


def delivery_error(fault: KafkaError | KafkaException, ticket: Ticket, *, left: bool = True) -> EoError:
    """What to tell the sender. Only an error that proves that the record was not written says so.

    left: whether the record left the client; what the client itself refuses did not.
    """
    error = kafka_error(fault)
    what = f"{ticket.destination.topic}: message {ticket.id}"
    why = f"{error.name()}: {error.str()}"
    if error.code() in _TOO_LARGE:
        return _too_large(what, why, ticket)
    if error.code() in OF_THE_RECORD:
        return EncodeError(f"{what} was refused: {why}. It was not written.", remedy="Correct the message.")
    if error.code() in _UNKNOWN_TOPIC:
        ticket.destination.doubted = True
        return UnknownTopic(f"{what} was not written: {why}.", remedy="Run: eo topics apply MODULE:APP")
    if error.code() in _FORBIDDEN:
        return NotAuthorized(
            f"{what} was not written: {why}.",
            remedy="Grant WRITE on the topic to this principal (kafka-acls), or use another one (EO_KAFKA_SASL_*).",
        )
    # Not so _PURGE_QUEUE: a record that was written, and whose answer got lost, waits in the queue to be sent again.
    if not left:
        return Retryable(f"{what} was not written: {why}.", remedy="Send it again.")
    return OutcomeUnknown(
        f"{what} was not confirmed, and may or may not be written: {why}.",
        ids=(ticket.id,),
        topics=(ticket.destination.topic,),
    )


def _too_large(what: str, why: str, ticket: Ticket) -> EncodeError:
    ticket.destination.doubted = True
    limit, client = ticket.destination.limit, ticket.destination.client_limit
    allowed = client if ticket.size > client else limit
    known = f"{allowed} are allowed" if allowed is not None else "the topic's max.message.bytes allows less"
    if allowed is not None and ticket.size < allowed * 0.9:
        return EncodeError(
            f"{what} has {ticket.size} bytes, and the request it was part of was too large: {why}. It was not written.",
            remedy="Send it again; its topic's max.message.bytes has changed, or set EO_KAFKA_BATCH_SIZE below it.",
        )
    return EncodeError(
        f"{what} has {ticket.size} bytes, {known} ({why}). It was not written.",
        remedy="Compress the payload in a codec, split it, or send a reference to data stored elsewhere (claim check); "
        "or raise Topic(max_bytes=), the topic's max.message.bytes and EO_KAFKA_MESSAGE_MAX_BYTES.",
    )
