"""Two lanes at once: each a process of its own with a database of its own, fed with cycles from here."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection as Channel
from multiprocessing.connection import wait
from pathlib import Path

from tests.campaign.forked_case import Case
from tests.campaign.forked_lane import Lane, Ran

_AT_ONCE = 4
_PATIENCE = 300.0


@dataclass(frozen=True)
class _Seat:
    channel: Channel
    pid: int


class Pool:
    """Lanes that run cycles; `close` ends them."""

    def __init__(self, urls: Iterable[str], directory: Path) -> None:
        self._seats = [self._fork(url, directory / f"lane{number}") for number, url in enumerate(urls)]

    def _fork(self, url: str, directory: Path) -> _Seat:
        directory.mkdir(parents=True, exist_ok=True)
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            ours.close()
            # Ctrl-C reaches the whole group: who feeds the lanes ends them, between two cycles.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            try:
                _live(theirs, url, directory)
            except BaseException:  # noqa: BLE001 - told here: who feeds it only sees that it is gone
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()
        return _Seat(ours, pid)

    def map(self, cases: Iterable[Case], *, stop: Callable[[], bool]) -> Iterator[Ran]:
        """What becomes of the cases, as they end; nothing more is begun once `stop` says so."""
        left, idle, busy = iter(cases), list(self._seats), dict[Channel, _Seat]()
        exhausted = False
        while busy or not (exhausted or stop()):
            while idle and not exhausted and not stop():
                some = [str(case) for _, case in zip(range(_AT_ONCE), left, strict=False)]
                exhausted = not some
                if some:
                    seat = idle.pop()
                    seat.channel.send(some)
                    busy[seat.channel] = seat
            if not busy:
                return
            ready = wait(list(busy), _PATIENCE)
            if not ready:
                raise AssertionError(f"no lane has answered for {_PATIENCE:g} s")
            for channel in ready:
                assert isinstance(channel, Channel)
                idle.append(busy.pop(channel))
                yield from channel.recv()

    def close(self) -> None:
        for seat in self._seats:
            seat.channel.close()
        for seat in self._seats:
            os.waitpid(seat.pid, 0)


def _live(channel: Channel, url: str, directory: Path) -> None:
    lane = Lane(url, directory)
    while True:
        try:
            some: list[str] = channel.recv()
        except EOFError:
            lane.close()
            os._exit(0)
        channel.send([lane.run(Case.parse(case)) for case in some])
