"""What the relay does when nothing goes wrong."""

from __future__ import annotations

from tests.relay.rig import Rig


def test_every_row_once_in_order_per_key_and_once_ends(rig: Rig) -> None:
    messages = rig.publish(500)
    relay = rig.start(once=True)
    assert relay.wait() == 0, relay.log()
    assert rig.left() == 0
    rig.assert_published(messages)
