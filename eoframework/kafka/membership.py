"""As whom a Kafka transaction moves a group's offsets: what lets the broker refuse a member that no longer is one."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from eoframework.errors import ConfigurationError, Retryable

_MAGIC = b"CGMDv2:"
_HEAD = struct.Struct("<i")


class NotAMember(Retryable):
    """The group has thrown this member out, or has not taken it in yet; nothing was sent."""


@dataclass(frozen=True, slots=True)
class Membership:
    """A group's metadata as the client hands it out, known to name a member and its generation.

    After being thrown out the client hands out generation -1 while `assignment()` still lists the partitions, and the
    broker takes offsets under -1 *unchecked* (KIP-848: while the group is empty, so after its successor has done the
    work and left): a frozen process would move them back. So it is read here, and refused.
    Source: KIP-447, `rd_kafka_consumer_group_metadata_write`.
    """

    raw: bytes
    group: str
    generation: int
    """The member epoch under KIP-848."""
    member: str

    @classmethod
    def read(cls, raw: object) -> Membership:
        """Raises NotAMember; ConfigurationError for a client that writes it in a form not known here."""
        if not isinstance(raw, bytes) or not raw.startswith(_MAGIC):
            raise ConfigurationError(
                f"this release of confluent-kafka hands out group metadata in an unknown form ({raw!r:.40}).",
                remedy="Install the release named in pyproject.toml.",
            )
        (generation,) = _HEAD.unpack_from(raw, len(_MAGIC))
        group, member = (part.decode() for part in raw[len(_MAGIC) + _HEAD.size :].split(b"\0")[:2])
        if generation < 0 or not member:
            raise NotAMember(f"this worker is no member of group {group!r} (generation {generation}).")
        return cls(raw, group, generation, member)
