"""The idempotent client of a `Producer`: any thread hands records over, one thread hears what became of each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from eoframework import clock, events
from eoframework.errors import ConfigurationError, EncodeError, Permanent, Retryable
from eoframework.kafka.contact import has_lost_cluster
from eoframework.kafka.delivery import Ticket, delivery_error, report
from eoframework.kafka.destinations import Destination
from eoframework.kafka.faults import is_topic_trouble, kafka_error
from eoframework.kafka.producer import REQUEST_SHARE, Outgoing, lower_batch_size

_log = logging.getLogger(__name__)

_SLICE = 0.1
_ROOM_SLICE = 0.005
_END_PATIENCE = 5.0
_HELD_AT_MOST = 0.05
_ASK = 3.0
_CHECK_SECONDS = 10.0


class Gate:
    """Lets the clients' threads wait while another one queues records.

    Each report needs Python's global lock for a moment; taken from a thread that also wants it, the two hand it to and
    fro for every record, which took three quarters of the time of many.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._open = threading.Event()
        self._open.set()

    def __enter__(self) -> None:
        with self._lock:
            self._holders += 1
            self._open.clear()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._open.set()

    def pass_through(self) -> None:
        """Wait while it is held, but only for a moment: others wait for reports too."""
        self._open.wait(_HELD_AT_MOST)

    def push_open(self) -> None:
        """Somebody needs the reports now."""
        self._open.set()


class SendingClient:
    """Sends records with acks=all; each one's ticket is told once, on this client's own thread. Thread-safe.

    Guarantee: a record is written once, or its ticket gets an error: at the latest after message.timeout.ms, and some
    seconds more where others timed out, and it is asked whether this client still finds its brokers.
    """

    def __init__(self, config: Mapping[str, Any], gate: Gate) -> None:
        """Raises ConfigurationError."""
        self._gate = gate
        self._config = dict(config)
        self._servers = config["bootstrap.servers"]
        self._patience = int(config["message.timeout.ms"]) / 1000
        self._ended = threading.Event()
        self._waiting = self._timed_out = False
        self._confirmed_at = self._next_check = 0.0
        self._cause: KafkaError | None = None
        self.fatal = ""
        """Why this client can send nothing any more; whoever wants to send makes another."""
        try:
            self._client = Producer({**config, "error_cb": self._on_error})
        except KafkaException as error:
            text = kafka_error(error).str()
            raise ConfigurationError(f"Kafka's settings: {text}.", remedy="Correct EO_KAFKA_*.") from error
        # Daemon: a program that forgets to close must be able to end; what is under way is waited for at exit.
        self._thread = threading.Thread(target=self._poll, name="eo-producer", daemon=True)
        self._thread.start()

    @property
    def unconfirmed(self) -> int:
        """How many records have not been reported yet."""
        return len(self._client)

    def is_own_thread(self) -> bool:
        """Whether the caller is on the thread that hears the reports, and so would wait for itself."""
        return threading.current_thread() is self._thread

    def send(self, record: Outgoing, *, deadline: float) -> None:
        """Queue a record; while the queue is full, wait for room until `deadline` (clock.monotonic()).

        Raises EncodeError, ConfigurationError or Retryable: it was not sent, and its ticket hears nothing.
        """
        ticket, asked = record.ticket, False
        assert ticket is not None
        while True:
            try:
                told = partial(self._tell, ticket)
                self._client.produce(record.topic, record.value, record.key, on_delivery=told, headers=record.headers)
                return
            except BufferError:
                self._wait_for_room(record, deadline)
            except KafkaException as error:
                fault = kafka_error(error)
                if fault.fatal():
                    self._break(fault)
                elif is_topic_trouble(fault) and not asked:
                    asked = self._ask_again(record.topic)
                    continue
                raise delivery_error(self._cause or fault, ticket, left=False) from error
            except (TypeError, ValueError) as error:
                what = f"{record.topic}: the Kafka client cannot send message {ticket.id}: {error}."
                raise EncodeError(what, remedy="Correct the message.") from error
            except RuntimeError as error:
                raise Permanent(f"{record.topic}: message {ticket.id} was not sent: the Producer is closed.") from error

    def flush(self, *, deadline: float) -> int:
        """Wait until every record is reported, also those queued meanwhile; returns how many are not at `deadline`."""
        # Never client.flush() beside the polling thread: when that one takes the last report, it waits for another.
        while (left := self.unconfirmed) and clock.monotonic() < deadline:
            clock.wait(self._ended, _ROOM_SLICE)
        return left

    def close(self, *, deadline: float) -> None:
        """Wait for the reports until `deadline`, give up what is left (its tickets hear so), and end the client."""
        if self.flush(deadline=deadline):
            self._client.purge()
            self.flush(deadline=clock.monotonic() + _END_PATIENCE)
        self._ended.set()
        if not self.is_own_thread():
            self._thread.join(_END_PATIENCE)
        try:
            self._client.close()
        except (KafkaException, RuntimeError) as error:
            _log.debug("closing a Kafka producer: %s; every record was reported.", error)

    def _ask_again(self, topic: str) -> bool:
        # The client remembers for up to five minutes that a topic was missing or forbidden; by now somebody may have
        # made it, or granted the right.
        try:
            self._client.list_topics(topic, timeout=_ASK)
        except KafkaException as error:
            _log.debug("asking about topic %s: %s; its sender is told what is known.", topic, kafka_error(error).str())
        return True

    def _wait_for_room(self, record: Outgoing, deadline: float) -> None:
        if self.is_own_thread():
            raise Retryable(
                f"{record.topic}: nothing was sent: the client's queue is full, and this done-callback is called on "
                "the thread that empties it.",
                remedy="Send from another thread.",
            )
        if clock.monotonic() >= deadline:
            raise Retryable(
                f"{record.topic}: nothing was sent: the client's queue stayed full; {self.unconfirmed} messages wait "
                "for Kafka.",
                remedy="Send more slowly, or raise EO_KAFKA_QUEUE_BUFFERING_MAX_MESSAGES or _MAX_KBYTES.",
            )
        self._gate.push_open()
        clock.wait(self._ended, _ROOM_SLICE)
        if self._cause is not None:  # a client given up has room, and sends nothing
            assert record.ticket is not None
            raise delivery_error(self._cause, record.ticket, left=False)

    def _tell(self, ticket: Ticket, error: KafkaError | None, message: Message) -> None:
        if error is None:
            self._confirmed_at = clock.monotonic()
        elif error.code() == KafkaError._MSG_TIMED_OUT:
            self._timed_out = True
        if error is not None and self._cause is not None and error.code() == KafkaError._PURGE_QUEUE:
            ticket.failed(delivery_error(self._cause, ticket))
        else:
            if error is None:
                events.emit("producer.confirmed", topic=ticket.destination.topic, id=ticket.id)
            report(ticket, error, message)

    def _poll(self) -> None:
        while not self._ended.is_set():
            self._gate.pass_through()
            try:
                self._client.poll(_SLICE)
                self._break_if_lost()
            except KafkaException as error:
                # So a fatal error is told here, and not to the error callback.
                self._on_error(kafka_error(error))
            except Exception:  # noqa: BLE001 - whatever a callback of the user's raised, the next report must be heard
                _log.exception("a report from Kafka could not be handed on; the others are.")
            if self._waiting and not self.unconfirmed:
                self._waiting = False
                _log.info("Kafka at %s: nothing waits any more.", self._servers)

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal():
            self._break(error)
        elif not self._waiting and self.unconfirmed:
            self._waiting = True
            events.emit("producer.waiting", servers=self._servers, messages=self.unconfirmed, why=error.str())
            _log.warning(
                "Kafka at %s: %s; %d messages wait and are tried again, each for at most %g s. None is lost without "
                "its sender being told.",
                self._servers,
                error.str(),
                self.unconfirmed,
                self._patience,
            )

    def _break_if_lost(self) -> None:
        now = clock.monotonic()
        # One that was confirmed something is only slow, and would not answer in time behind what it still sends.
        if not self._timed_out or now < max(self._next_check, self._confirmed_at + self._patience):
            return
        self._timed_out, self._next_check = False, now + _CHECK_SECONDS
        if not self._ended.is_set() and has_lost_cluster(self._client, self._config):
            self._break(KafkaError(KafkaError._ALL_BROKERS_DOWN, "it finds no broker any more, others do"))

    def _break(self, error: KafkaError) -> None:
        if self._cause is not None:
            return
        self._cause, self.fatal = error, f"{error.name()}: {error.str()}"
        _log.error("a Kafka producer is replaced: %s; the senders of what it still held are told.", self.fatal)
        events.emit("producer.broken", why=self.fatal)
        # It would hold them until their time is over, and can send none of them.
        self._client.purge()


class SendingClients:
    """One client for all ordinary topics, and one more for those that take only smaller requests. Thread-safe.

    A request of several small records that exceeds its topic's limit fails them all, and the size of requests is the
    client's, not the topic's. A topic keeps its client, or records of a key could overtake each other.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self.gate = Gate()
        """To be held while many records are queued."""
        self._lock = threading.Lock()
        self._clients: dict[int, SendingClient] = {}
        self._of: dict[str, tuple[Destination, SendingClient]] = {}

    def send(self, record: Outgoing, destination: Destination, *, deadline: float) -> None:
        """As SendingClient.send."""
        known = self._of.get(record.topic)
        if known is None or known[0] is not destination or known[1].fatal:
            known = (destination, self._client_for(destination))
            self._of[record.topic] = known
        known[1].send(record, deadline=deadline)

    def is_own_thread(self) -> bool:
        """Whether the caller is on one of the clients' threads."""
        return any(client.is_own_thread() for client in list(self._clients.values()))

    def flush(self, *, deadline: float) -> int:
        """How many records are not reported at `deadline`."""
        return sum(client.flush(deadline=deadline) for client in list(self._clients.values()))

    def close(self, *, deadline: float) -> None:
        """End them all."""
        with self._lock:
            clients = list(self._clients.values())
            self._clients.clear()
        for client in clients:
            client.close(deadline=deadline)

    def _client_for(self, destination: Destination) -> SendingClient:
        config = dict(self._config)
        if destination.limit is not None:
            lower_batch_size(config, int(destination.limit * REQUEST_SHARE))
        size = int(config.get("batch.size", 0))
        with self._lock:
            client = self._clients.get(size)
            if client is None or client.fatal:
                self._retire(client)
                client = self._clients[size] = SendingClient(config, self.gate)
            return client

    def _retire(self, client: SendingClient | None) -> None:
        if client is not None:
            threading.Thread(target=client.close, kwargs={"deadline": clock.monotonic()}, daemon=True).start()
