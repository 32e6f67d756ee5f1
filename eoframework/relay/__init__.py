"""From the outbox to Kafka. The life of one row is in `relay`, who owns which shard in `worker`."""

from eoframework.relay.worker import RelayWorker

__all__ = ["RelayWorker"]
