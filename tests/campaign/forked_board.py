"""What a process leaves behind when it is killed: memory it shares with the one that forked it."""

from __future__ import annotations

import mmap
import struct

_SIZE = 1 << 20
_HEAD = struct.Struct("=I")


class Board:
    """An append-only list of lines. Each is there as a whole or not at all, whenever its writer is killed.

    It stands for what is outside a process and outside the database: a receiver of calls, and who watches.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _SIZE)
        self.clear()

    def clear(self) -> None:
        _HEAD.pack_into(self._memory, 0, _HEAD.size)

    def note(self, line: str) -> None:
        (end,) = _HEAD.unpack_from(self._memory, 0)
        content = line.encode() + b"\0"
        if end + len(content) > _SIZE:
            raise MemoryError("the board is full: a process does not end")
        self._memory[end : end + len(content)] = content
        # Last, so that a line half written is none.
        _HEAD.pack_into(self._memory, 0, end + len(content))

    def lines(self) -> list[str]:
        (end,) = _HEAD.unpack_from(self._memory, 0)
        return self._memory[_HEAD.size : end].decode().split("\0")[:-1]

    def count(self, line: str) -> int:
        return self.lines().count(line)
