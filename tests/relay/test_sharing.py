"""Several relays share the shards; one that dies or leaves is replaced."""

from __future__ import annotations

import signal

from tests.relay.rig import SHARDS, Rig


def test_relays_share_fairly_and_take_over_from_the_dead(rig: Rig) -> None:
    first = rig.start()
    rig.wait_for(lambda: first.owns() == SHARDS, what="the first relay to own all")
    second = rig.start()
    rig.wait_for(lambda: (first.owns(), second.owns()) == (2, 2), what="an even share")
    messages = rig.publish(300)
    second.kill()
    messages += rig.publish(300)
    rig.wait_for(lambda: first.owns() == SHARDS, what="the survivor to own all")
    rig.wait_empty()
    rig.assert_published(messages)


def test_a_relay_that_leaves_gives_its_shards_back_at_once(rig: Rig) -> None:
    # With a lease this long, only giving back can explain that the other one gets them.
    first, second = rig.start(relay_lease=120), rig.start(relay_lease=120)
    rig.wait_for(lambda: first.owns() + second.owns() == SHARDS, what="all shards to be owned")
    messages = rig.publish(100)
    first.signal(signal.SIGTERM)
    assert first.wait() == 0, first.log()
    rig.wait_empty()
    assert rig.sql("SELECT count(*) FROM eo.relay_member") == [(1,)]
    rig.assert_published(messages)
