"""Suspicion: whether the owners before us may have died of a message.

A message that ends its process leaves no exception. What it leaves is an owner that began at an offset and got nowhere,
again and again. So each owner writes, before its first batch of a partition, that it has begun there; any other commit
of the partition takes that back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from eoframework.transform.mark import Stand

# Owners that got nowhere before us. One may have been killed for another reason, and so may two.
_STUCK = 2


class Suspicion:
    """The partitions of one worker about which nothing is said yet, and those in which messages run alone."""

    def __init__(self, *, careful_for: int) -> None:
        """`careful_for`: so many messages may have been in flight when the process died."""
        self._careful_for = careful_for
        self._ours: set[int] = set()
        self._new: set[int] = set()
        self._left: dict[int, int] = {}

    def took_over(self, partition: int, stand: Stand) -> None:
        """The partition begins there; run its messages alone if others got nowhere at this offset."""
        if partition in self._ours:
            # Again, after a doubt of our own: we have not died, and nobody else has had it meanwhile.
            return
        self._ours.add(partition)
        self._new.add(partition)
        self._left.pop(partition, None)
        if stand.mark.takeovers >= _STUCK or stand.mark.crashes:
            self._left[partition] = self._careful_for

    def gone(self, partition: int) -> None:
        """It is no longer ours."""
        self._ours.discard(partition)
        self._new.discard(partition)
        self._left.pop(partition, None)

    def to_note(self, stands: Mapping[int, Stand], touched: Collection[int]) -> dict[int, Stand]:
        """What is to be committed before the first batch of partitions that were taken over."""
        return {
            p: Stand(stands[p].offset, replace(stands[p].mark, takeovers=stands[p].mark.takeovers + 1))
            for p in self._new & set(touched)
        }

    def noted(self, partitions: Collection[int]) -> None:
        """It was committed."""
        self._new.difference_update(partitions)

    def careful(self, touched: Collection[int]) -> set[int]:
        """Those in which messages run alone."""
        return self._left.keys() & set(touched)

    def survived(self, partition: int, messages: int) -> None:
        """So many messages of it did not end the process."""
        if partition in self._left:
            self._left[partition] -= messages
            if self._left[partition] <= 0:
                del self._left[partition]
