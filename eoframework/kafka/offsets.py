"""Offsets of a group: our mark on them, and what to say when one of them is not in the log."""

from __future__ import annotations

from eoframework.errors import FailClosed

_MARK = "eo:"


def offset_mark(epoch: int) -> str:
    """Metadata of every offset we commit: the epoch of the claim it was made under.

    Tools that move a group's offsets by hand write none, so we see their hand. The epoch tells an offset from before
    `eo position set` from one that a restored database does not know of.
    """
    return f"{_MARK}{epoch}"


def epoch_of_mark(mark: str) -> int | None:
    """The epoch under which we committed an offset; None if it was not us."""
    epoch = mark.removeprefix(_MARK)
    return int(epoch) if mark.startswith(_MARK) and epoch.isdecimal() else None


class OutOfRange(FailClosed):
    """The offset where we stand is not in the log."""


def offset_out_of_range(group: str, topic: str, partition: int | None, detail: str) -> OutOfRange:
    """Kafka no longer has, or does not have yet, the offset where we stand."""
    return OutOfRange(
        f"{topic}[{partition}]: the stored position is outside the log ({detail}): "
        "records were deleted before they were processed, or the topic is not the one it was.",
        remedy="Nothing was skipped. Find out why; then, to go on with the first message there is: "
        f"eo position set {group} {partition} earliest",
    )
