"""Two workers of one EO_INSTANCE: they fence each other, and one of them ends and says why."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from eoframework import clock
from eoframework.errors import RestartNeeded
from eoframework.lifecycle import Backoff
from eoframework.settings import Settings
from eoframework.transform.worker import TransformWorker
from tests.transform.mill import Flour, Grain, Mill


@pytest.fixture
def mill(settings: Settings) -> Iterator[Mill]:
    made = Mill(settings, partitions=2)
    yield made
    made.stop()


def test_one_of_two_ends_and_names_the_setting(mill: Mill, caplog: pytest.LogCaptureFixture) -> None:
    """Each commits now and then, so what counts is how often within a time, not how often in a row.

    Seen to fail with the count set back at each commit: they fenced each other until the deadline.
    """

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(grain: Grain) -> Flour:
        return Flour(n=grain.n)

    first = mill.start(instance="till")
    settings = mill.settings.model_copy(update={"max_wait": 0.1, "instance": "till"})
    second = TransformWorker(
        mill.app.transforms[0], app=mill.app, settings=settings, admin=mill.admin, stop=threading.Event()
    )
    try:
        second.start()
        for worker in (first, second):
            worker._pause = Backoff(first=0.01, longest=0.02)
        with pytest.raises(RestartNeeded, match=r"fenced 3 times within 60 s: .* EO_INSTANCE=till"):
            work(mill, first, second)
    finally:
        second.close()
    assert "another process seems to run with EO_INSTANCE=till" in caplog.text


def work(mill: Mill, *workers: TransformWorker) -> None:
    """Something to do for each, again and again, until one stops or the time is over."""
    deadline = clock.monotonic() + 50
    while clock.monotonic() < deadline:
        for partition in (0, 1):
            mill.pour([partition], partition=partition)
        for worker in workers:
            worker.step()
