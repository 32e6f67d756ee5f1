"""What a broker says of itself, asked by a plain client."""

from __future__ import annotations

from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType


def broker_configuration(bootstrap_servers: str) -> dict[str, str | None]:
    """All properties of the one broker."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    resource = ConfigResource(ResourceType.BROKER, "1")
    entries = admin.describe_configs([resource], request_timeout=10)[resource].result(10)
    return {name: entry.value for name, entry in entries.items()}
