"""The relay's checkpoint: what one Kafka transaction says about the outbox rows it published.

It stands inside the transaction, so it exists if and only if the rows' messages do; that is what makes a crash between
Kafka's commit and the rows' delete decidable.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from uuid import UUID

from eoframework.errors import FailClosed


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The last batch a shard's owner published."""

    outbox_id: UUID
    cluster_id: str
    topic_id: UUID
    shard: int
    batch_no: int
    seqs: tuple[int, ...]
    digest: str

    def encode(self) -> bytes:
        """As JSON, so that a person can read it with any consumer."""
        return json.dumps(
            {
                "outbox": str(self.outbox_id),
                "cluster": self.cluster_id,
                "topic": str(self.topic_id),
                "shard": self.shard,
                "batch": self.batch_no,
                "seqs": self.seqs,
                "digest": self.digest,
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def decode(cls, value: bytes | None) -> Checkpoint:
        """The checkpoint written by `encode`. Raises FailClosed for anything else: it must not be taken for none."""
        try:
            found = json.loads(value or b"")
            return cls(
                outbox_id=UUID(found["outbox"]),
                cluster_id=str(found["cluster"]),
                topic_id=UUID(found["topic"]),
                shard=int(found["shard"]),
                batch_no=int(found["batch"]),
                seqs=tuple(map(int, found["seqs"])),
                digest=str(found["digest"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise FailClosed(
                f"the relay's checkpoint topic holds a record that is no checkpoint ({error!r}).",
                remedy="Find who else writes to that topic; only relays may.",
            ) from error


def digest_of(rows: Iterable[tuple[int, UUID]]) -> str:
    """A fingerprint of (seq, id) pairs, in their order.

    `seq` alone does not name a row: a restored or promoted database rewinds the sequence, and another row gets the
    number. Compared by seq alone, a take-over deleted 100 of 100 rows that had never been published.
    """
    digest = hashlib.sha256()
    for seq, message_id in rows:
        digest.update(struct.pack(">q16s", seq, message_id.bytes))
    return digest.hexdigest()


def checkpoint_topic(outbox_id: UUID) -> str:
    """The compacted topic of an outbox's checkpoints; partition = shard."""
    return f"eo.relay.{outbox_id}"


def transactional_id(outbox_id: UUID, shard: int) -> str:
    """The name under which the owners of a shard fence each other at the broker."""
    return f"eo.relay.{outbox_id}.{shard}"
