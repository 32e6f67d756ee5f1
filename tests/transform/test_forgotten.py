"""`eo position forget` beside a worker that is starting."""

from __future__ import annotations

from eoframework import transform_positions
from eoframework.db.transform_desk import TransformDesk
from eoframework.settings import Settings
from eoframework.transform.start import Beginning
from tests.transform.mill import Flour, Grain, Mill


def test_forgotten_between_registration_and_joining_it_begins_as_a_first_start_does(settings: Settings) -> None:
    """Seen to fail without `_start_over`: it began at 0, although it is to start at the latest."""
    mill = Mill(settings, partitions=2)

    @mill.app.transform(mill.grain, to=mill.flour, name="grind", start="latest")
    def grind(grain: Grain) -> Flour:
        return Flour(n=grain.n)

    mill.pour([1, 2, 3])
    desk = TransformDesk(mill.app.database)
    beginning = Beginning(mill.app.transforms[0], mill.app.database, mill.admin)
    stream = beginning.register(app=mill.app.name, declared=mill.app.groups)
    assert transform_positions.forget(mill.app.database, mill.admin, desk.lines(mill.group), mill.group) == 2
    mill.pour([4])
    assert beginning.missing(stream, [0]) == {0: 4}
    assert [(line.partition, line.start_offset) for line in desk.lines(mill.group)] == [(0, 4), (1, 0)]
    mill.run_to(4)
    assert mill.ground() == []
    mill.stop()
