"""Development services: real Kafka (one broker or three) and a real PostgreSQL server on a bare machine, no Docker.

    with dev.start(Path(".eo")) as services:
        services.database_url, services.bootstrap_servers

`stack` starts and finds them, `kafka` and `postgres` are one process each, `cluster` is the brokers together, `guard`
sees that nothing is left behind.
"""

from eoframework.dev.cluster import KafkaCluster
from eoframework.dev.kafka import KafkaBroker, KafkaOptions
from eoframework.dev.postgres import PostgresOptions, PostgresServer
from eoframework.dev.stack import Services, ServiceStatus, Watcher, down, find, reset, start, status

__all__ = [
    "KafkaBroker",
    "KafkaCluster",
    "KafkaOptions",
    "PostgresOptions",
    "PostgresServer",
    "ServiceStatus",
    "Services",
    "Watcher",
    "down",
    "find",
    "reset",
    "start",
    "status",
]
