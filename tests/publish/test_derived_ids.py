"""Ids that are the same however often a handler or a transform runs."""

from __future__ import annotations

import hashlib
import uuid

import pytest

from eoframework.message import DerivedIds, Source, derived_id

TOPIC = uuid.UUID("018f6e2a-0000-7000-8000-000000000001")


@pytest.mark.parametrize("offset", [0, 7, 2**40 + 300])
@pytest.mark.parametrize("timestamp", [-1, 0, 1_700_000_000_123, 2**48 + 5])
@pytest.mark.parametrize("index", [0, 1, 12_345])
def test_they_are_time_and_a_hash_of_the_place_in_the_layout_of_version_7(
    offset: int, timestamp: int, index: int
) -> None:
    """Written in the text, they are the bits of RFC 9562; nobody's ids may change with a release.

    Fails with `_VARIANT` as the digit itself, without the mask on the time, or with the index left out of the hash.
    """
    block, place = divmod(offset, 256)
    seed = f"shop.book\0{TOPIC}\0{3}\0{block}\0{index}"
    tail = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:9] + bytes([place]), "big")
    number = (max(timestamp, 0) % 2**48) << 80 | tail
    wanted = uuid.UUID(int=number & ~(0xF << 76) & ~(0x3 << 62) | 0x7 << 76 | 0x2 << 62)
    assert (wanted.version, wanted.variant) == (7, uuid.RFC_4122)
    assert derived_id(Source("shop.book", TOPIC, 3, offset, timestamp), index) == wanted
    assert DerivedIds("shop.book", TOPIC, 3).text(offset, timestamp, index) == str(wanted)


def test_each_place_and_index_has_its_own_in_whatever_order_they_are_asked_for() -> None:
    """Fails with the block left out of the hash, and with the stems of the block before kept."""
    ids, again = DerivedIds("shop.book", TOPIC, 3), DerivedIds("shop.book", TOPIC, 3)
    places = [(offset, index) for offset in range(1000) for index in range(3)]
    found = {place: ids.text(place[0], 5, place[1]) for place in places}
    assert len(set(found.values())) == len(places)
    assert {place: again.text(place[0], 5, place[1]) for place in reversed(places)} == found
