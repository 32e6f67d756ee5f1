"""Stable hashes of message keys: the same in every process and release, never Python's own `hash`."""

from __future__ import annotations

import hashlib
import zlib
from uuid import UUID

ORDER_BUCKETS = 1024
"""How many advisory locks keep the order of all keys.

One lock per key would exhaust PostgreSQL's shared lock table (500 keys failed at the 30th worker); a bounded
bucket space cannot, at the price of two unrelated keys sometimes waiting for each other's COMMIT.
"""


def shard_hash(key: bytes | None, message_id: bytes) -> int:
    """The number whose remainder by the shard count is a message's relay shard.

    By key, so that a key has one owner; without a key there is no order to keep, so the message's id spreads the load.
    """
    return zlib.crc32(message_id if key is None else key)


def order_bucket(key: bytes) -> int:
    """The advisory-lock bucket of a key."""
    return zlib.crc32(key, 0x656F) % ORDER_BUCKETS


def lane_of_key(key: bytes) -> UUID:
    """What a parked message waits in: one lane for each key. Short, since a key may be larger than an index entry."""
    return UUID(bytes=hashlib.sha256(key).digest()[:16])
