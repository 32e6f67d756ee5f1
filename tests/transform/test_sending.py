"""What a transform sends where."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from eoframework import Out, Topic
from eoframework.settings import Settings
from tests.transform.mill import Flour, Grain, Mill


@pytest.fixture
def mill(settings: Settings) -> Iterator[Mill]:
    made = Mill(settings)
    yield made
    made.stop()


def test_a_topic_that_is_declared_twice_is_one(mill: Mill) -> None:
    """Seen to fail (given up: "which it does not name") while the objects were compared."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(grain: Grain) -> Out[Flour]:
        return Out(Topic(mill.flour.name, Flour), Flour(n=grain.n), key=b"\xff\x00")

    mill.pour([1, 2])
    mill.run_to(2)
    assert mill.ground() == [1, 2]
    assert {message.key() for message in mill.read(mill.flour.name)} == {b"\xff\x00"}


def test_none_for_some_and_many_for_others(mill: Mill) -> None:
    """The offset moves also past what makes nothing."""

    @mill.app.transform(mill.grain, to=mill.flour, name="grind")
    def grind(grain: Grain) -> Iterator[Flour]:
        return (Flour(n=grain.n) for _ in range(grain.n * 3000))

    mill.pour([0, 2, 0, 1, 0])
    mill.run_to(5)
    assert mill.ground() == [2] * 6000 + [1] * 3000
