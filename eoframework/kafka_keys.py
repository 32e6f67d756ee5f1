"""librdkafka's configuration keys: which exist, which are secret, and which may not be changed and why.

Values only, so that settings can refuse a bad key without the Kafka client being imported. The lists are those of
librdkafka 2.16 (`rd_kafka_conf_properties_show`); a test compares them with the installed library.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from eoframework.errors import ConfigurationError

_SHARED = """
    allow.auto.create.topics api.version.fallback.ms api.version.request api.version.request.timeout.ms
    background_event_cb bootstrap.servers broker.address.family broker.address.ttl broker.version.fallback
    builtin.features client.dns.lookup client.id client.rack closesocket_cb connect_cb connections.max.idle.ms
    debug default_topic_conf enable.metrics.push enable.random.seed enable.sasl.oauthbearer.unsecure.jwt
    enable.ssl.certificate.verification enabled_events error_cb https.ca.location https.ca.pem interceptors
    internal.termination.signal log.connection.close log.queue log.thread.name log_cb log_level max.in.flight
    max.in.flight.requests.per.connection message.copy.max.bytes message.max.bytes metadata.broker.list
    metadata.max.age.ms metadata.recovery.rebootstrap.trigger.ms metadata.recovery.strategy
    oauthbearer_token_refresh_cb opaque open_cb plugin.library.paths receive.message.max.bytes
    reconnect.backoff.jitter.ms reconnect.backoff.max.ms reconnect.backoff.ms resolve_cb retry.backoff.max.ms
    retry.backoff.ms sasl.kerberos.keytab sasl.kerberos.kinit.cmd sasl.kerberos.min.time.before.relogin
    sasl.kerberos.principal sasl.kerberos.service.name sasl.mechanism sasl.mechanisms
    sasl.oauthbearer.assertion.algorithm sasl.oauthbearer.assertion.claim.aud
    sasl.oauthbearer.assertion.claim.exp.seconds sasl.oauthbearer.assertion.claim.iss
    sasl.oauthbearer.assertion.claim.jti.include sasl.oauthbearer.assertion.claim.nbf.seconds
    sasl.oauthbearer.assertion.claim.sub sasl.oauthbearer.assertion.file
    sasl.oauthbearer.assertion.jwt.template.file sasl.oauthbearer.assertion.private.key.file
    sasl.oauthbearer.assertion.private.key.passphrase sasl.oauthbearer.assertion.private.key.pem
    sasl.oauthbearer.client.credentials.client.id sasl.oauthbearer.client.credentials.client.secret
    sasl.oauthbearer.client.id sasl.oauthbearer.client.secret sasl.oauthbearer.config
    sasl.oauthbearer.extensions sasl.oauthbearer.grant.type sasl.oauthbearer.metadata.authentication.type
    sasl.oauthbearer.method sasl.oauthbearer.scope sasl.oauthbearer.sub.claim.name
    sasl.oauthbearer.token.endpoint.url sasl.password sasl.username security.protocol socket.blocking.max.ms
    socket.connection.setup.timeout.ms socket.keepalive.enable socket.max.fails socket.nagle.disable
    socket.receive.buffer.bytes socket.send.buffer.bytes socket.timeout.ms socket_cb ssl.ca.certificate.stores
    ssl.ca.location ssl.ca.pem ssl.certificate.location ssl.certificate.pem ssl.certificate.verify_cb
    ssl.cipher.suites ssl.crl.location ssl.curves.list ssl.endpoint.identification.algorithm ssl.engine.id
    ssl.engine.location ssl.key.location ssl.key.password ssl.key.pem ssl.keystore.location
    ssl.keystore.password ssl.providers ssl.sigalgs.list ssl_ca ssl_certificate ssl_engine_callback_data ssl_key
    statistics.interval.ms stats_cb throttle_cb topic.blacklist topic.metadata.propagation.max.ms
    topic.metadata.refresh.fast.cnt topic.metadata.refresh.fast.interval.ms topic.metadata.refresh.interval.ms
    topic.metadata.refresh.sparse
"""
_CONSUMER = """
    auto.commit.enable auto.commit.interval.ms auto.offset.reset check.crcs consume.callback.max.messages
    consume_cb coordinator.query.interval.ms enable.auto.commit enable.auto.offset.store enable.partition.eof
    fetch.error.backoff.ms fetch.max.bytes fetch.message.max.bytes fetch.min.bytes fetch.queue.backoff.ms
    fetch.wait.max.ms group.id group.instance.id group.protocol group.protocol.type group.remote.assignor
    heartbeat.interval.ms isolation.level max.partition.fetch.bytes max.poll.interval.ms max.poll.records
    offset.store.method offset.store.path offset.store.sync.interval.ms offset_commit_cb
    partition.assignment.strategy queued.max.messages.kbytes queued.min.messages rebalance_cb session.timeout.ms
    share.acknowledgement.mode
"""
_PRODUCER = """
    acks batch.num.messages batch.size compression.codec compression.level compression.type
    delivery.report.only.error delivery.timeout.ms dr_cb dr_msg_cb enable.gapless.guarantee enable.idempotence
    linger.ms message.send.max.retries message.timeout.ms msg_order_cmp partitioner partitioner_cb
    produce.offset.report queue.buffering.backpressure.threshold queue.buffering.max.kbytes
    queue.buffering.max.messages queue.buffering.max.ms queuing.strategy request.required.acks
    request.timeout.ms retries sticky.partitioning.linger.ms transaction.timeout.ms transactional.id
"""
SHARED = frozenset(_SHARED.split())
CONSUMER = frozenset(_CONSUMER.split())
PRODUCER = frozenset(_PRODUCER.split())
KNOWN = SHARED | CONSUMER | PRODUCER

_SECRET = """
    sasl.password ssl.key.password ssl.key.pem ssl.keystore.password sasl.oauthbearer.client.secret
    sasl.oauthbearer.client.credentials.client.secret sasl.oauthbearer.config
    sasl.oauthbearer.assertion.private.key.passphrase sasl.oauthbearer.assertion.private.key.pem
"""

SECRET = frozenset(_SECRET.split())

_POSITION = "the position in PostgreSQL, written in the same transaction as the effects, decides what was processed"
_LOSS = "an offset out of range must stop the consumer, not skip or repeat records"
_ACKS = "a record that only the leader holds is lost with the leader"
_PARTITIONER = "a key must keep its partition across producers and releases, or its order is lost"
_QUARANTINE = "the rule that keeps a late end of a Kafka transaction from tearing the next one rests on 100 ms"
_MESSAGE_TIMEOUT = (
    "it follows EO_TRANSACTION_TIMEOUT (for transforms: use EO_TRANSFORM_MESSAGE_TIMEOUT), or a record outlives its "
    "Kafka transaction"
)
_NO_CALLBACK = "callbacks cannot come from settings"

REASONS: Mapping[str, str] = {
    "enable.auto.commit": _POSITION,
    "auto.commit.enable": _POSITION,
    "auto.commit.interval.ms": _POSITION,
    "enable.auto.offset.store": _POSITION,
    "offset.store.method": _POSITION,
    "offset.store.path": _POSITION,
    "offset.store.sync.interval.ms": _POSITION,
    "auto.offset.reset": f"{_LOSS}; where a new consumer begins is said by @app.handler(start=...)",
    "isolation.level": "records of aborted Kafka transactions must never reach a handler",
    "check.crcs": "a damaged record must be noticed before it has an effect",
    "enable.partition.eof": "the consumer decides for itself where it needs the end of a partition",
    "allow.auto.create.topics": "a topic created in passing has the broker's default replicas; use `eo topics apply`",
    "acks": _ACKS,
    "request.required.acks": _ACKS,
    "enable.idempotence": "a producer's own retry would write the record twice",
    "enable.gapless.guarantee": "a failed record aborts its whole Kafka transaction already",
    "delivery.report.only.error": "whoever sends counts the confirmation of every record",
    "partitioner": _PARTITIONER,
    "retry.backoff.ms": _QUARANTINE,
    "retry.backoff.max.ms": _QUARANTINE,
    "group.id": "the group is named by the app and the handler; use @app.handler(name=...)",
    "group.protocol": "use EO_GROUP_PROTOCOL",
    "max.poll.interval.ms": "it stands above the other timeouts; use EO_MAX_POLL_INTERVAL (seconds)",
    "transactional.id": "two of one name fence each other; a transform's follows EO_INSTANCE, a Producer's its name=",
    "transaction.timeout.ms": "use EO_TRANSACTION_TIMEOUT, for transforms EO_TRANSFORM_TRANSACTION_TIMEOUT (seconds)",
    "message.timeout.ms": _MESSAGE_TIMEOUT,
    "delivery.timeout.ms": _MESSAGE_TIMEOUT,
    "bootstrap.servers": "use EO_KAFKA_BOOTSTRAP_SERVERS",
    "metadata.broker.list": "use EO_KAFKA_BOOTSTRAP_SERVERS",
    "client.id": "it names the worker, so that broker logs and `eo` speak of the same thing",
    "builtin.features": "it is read-only",
    "log.queue": "log lines go through Python's logging",
    "enabled_events": _NO_CALLBACK,
    "default_topic_conf": _NO_CALLBACK,
    "interceptors": _NO_CALLBACK,
    "opaque": _NO_CALLBACK,
    "msg_order_cmp": _NO_CALLBACK,
    "ssl_engine_callback_data": _NO_CALLBACK,
    "internal.termination.signal": "signals drain the worker",
}
"""Keys that cannot be overridden, and why."""

_BROKER_DECIDES = "under EO_GROUP_PROTOCOL=consumer the broker decides it ({}); or set EO_GROUP_PROTOCOL=classic"
CLASSIC_ONLY: Mapping[str, str] = {
    "session.timeout.ms": _BROKER_DECIDES.format("group.consumer.session.timeout.ms"),
    "heartbeat.interval.ms": _BROKER_DECIDES.format("group.consumer.heartbeat.interval.ms"),
    "partition.assignment.strategy": _BROKER_DECIDES.format("group.consumer.assignors"),
    "group.protocol.type": _BROKER_DECIDES.format("(none)"),
    "group.instance.id": "a static member never came back from a kill under EO_GROUP_PROTOCOL=consumer;"
    " set EO_GROUP_PROTOCOL=classic to use it",
}
"""Keys that only the classic group protocol takes."""

_CANONICAL = {key.replace("_", "."): key for key in KNOWN}


def canonical(name: str) -> str:
    """librdkafka's spelling of a key written with dots, underscores or capitals; unknown ones in dotted lower case."""
    dotted = name.lower().replace("_", ".")
    return _CANONICAL.get(dotted, dotted)


def check_overrides(overrides: Mapping[str, str], *, group_protocol: str, where: str = "EO_KAFKA_*") -> None:
    """Refuse unknown and unsafe keys by name, with the reason; never shows a value, which may be a secret.

    Raises ConfigurationError.
    """
    for key, value in overrides.items():
        if key not in KNOWN:
            raise ConfigurationError(
                f"{where}: librdkafka has no setting {key!r}.{_did_you_mean(key)}",
                remedy="Its CONFIGURATION.md lists them all.",
            )
        reason = _reason_against(key, value, group_protocol)
        if reason:
            raise ConfigurationError(f"{where}: {key} cannot be overridden: {reason}.", remedy=f"Remove {key}.")


def environment_name(key: str) -> str:
    """`session.timeout.ms` as the environment spells it: EO_KAFKA_SESSION_TIMEOUT_MS."""
    return "EO_KAFKA_" + key.upper().replace(".", "_")


def _reason_against(key: str, value: str, group_protocol: str) -> str | None:
    if key in REASONS:
        return REASONS[key]
    if key.endswith("_cb"):
        return _NO_CALLBACK
    if group_protocol == "consumer" and key in CLASSIC_ONLY:
        return CLASSIC_ONLY[key]
    if key in {"max.in.flight", "max.in.flight.requests.per.connection"} and value.isdigit() and int(value) > 5:
        return "above 5 requests in flight the idempotent producer could reorder records"
    if key in {"retries", "message.send.max.retries"} and value == "0":
        return "without retries every passing trouble of a broker aborts the batch"
    return None


def _did_you_mean(key: str) -> str:
    near = difflib.get_close_matches(key, sorted(KNOWN - REASONS.keys()), n=1, cutoff=0.6)
    return f" Did you mean {near[0]} ({environment_name(near[0])})?" if near else ""
