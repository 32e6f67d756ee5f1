"""What a broker says and holds, asked by plain clients."""

from __future__ import annotations

from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType
from confluent_kafka.cimpl import NewTopic


def broker_configuration(bootstrap_servers: str) -> dict[str, str | None]:
    """All properties of the one broker."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    resource = ConfigResource(ResourceType.BROKER, "1")
    entries = admin.describe_configs([resource], request_timeout=10)[resource].result(10)
    return {name: entry.value for name, entry in entries.items()}


def commit(bootstrap_servers: str, topic: str, value: bytes) -> None:
    """One record in a new topic, in a Kafka transaction."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(10)
    producer = Producer({"bootstrap.servers": bootstrap_servers, "transactional.id": topic})
    producer.init_transactions(10)
    producer.begin_transaction()
    producer.produce(topic, value)
    producer.commit_transaction(10)


def committed(bootstrap_servers: str, topic: str) -> list[bytes | None]:
    """What `read_committed` readers see in a topic's one partition."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "reader",
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 10,
            "enable.auto.commit": False,
        }
    )
    consumer.assign([TopicPartition(topic, 0, 0)])
    found: list[bytes | None] = []
    try:
        while True:
            message = consumer.poll(30)
            assert message is not None, f"{topic} was not read to its end within 30 s"
            error = message.error()
            if error is None:
                found.append(message.value())
            elif error.code() == KafkaError._PARTITION_EOF:
                return found
            else:
                raise AssertionError(str(error))
    finally:
        consumer.close()
