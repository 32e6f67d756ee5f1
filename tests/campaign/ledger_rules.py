"""What becomes of each message of the campaign's load: known from its number alone, to the app and to the checker.

entries -> book: ledger, `parts` messages -> steps -> settle: ledger, one message -> settled -> crumble: `crumbs`
"""

from __future__ import annotations

import zlib

GHOSTS = 1_000_000_000
"""Entries from this number on are sent in transactions that are aborted: nobody may ever act on one."""
PARTS = 10
"""Below so many parts an entry has; an item of the second handler's ledger is n * PARTS + part."""
EVER = 1_000
CONSUMERS = ("book", "settle")


def parts(n: int) -> int:
    """How many steps the booking of an entry publishes."""
    return (0, 1, 2, 1)[n % 4]


def crumbs(item: int) -> int:
    """How many records the transform makes of a settled item."""
    return (1, 2, 0, 3)[_mixed("crumbs", item) % 4]


def poison(consumer: str, item: int) -> bool:
    """Whether the handler or transform of this name rejects the item, whenever it runs."""
    return _mixed(f"poison {consumer}", item) % 71 == 0


def failures(consumer: str, item: int) -> int:
    """How many attempts at the item fail before one succeeds."""
    if poison(consumer, item):
        return EVER
    return (1, 2)[item % 2] if _mixed(f"fails {consumer}", item) % 83 == 0 else 0


def amount(consumer: str, item: int) -> int:
    """What the item adds to its key's balance: another number for each item, so that a sum shows what is doubled."""
    return _mixed(f"amount {consumer}", item) % 100_000 + 1


def has_id(n: int) -> bool:
    """Whether the producer gives the entry an id; only then may it send it twice."""
    return n % 5 != 0


def message_id(n: int) -> bytes:
    return b"entry-%d" % n


def key_of(n: int, keys: int) -> str:
    return f"k{_mixed('key', n) % keys}"


def steps_of(n: int) -> list[int]:
    """The items of the second handler's ledger that an entry leads to."""
    return [n * PARTS + part for part in range(parts(n))]


def _mixed(what: str, item: int) -> int:
    # Not hash(): it differs from process to process.
    return zlib.crc32(f"{what} {item}".encode())
