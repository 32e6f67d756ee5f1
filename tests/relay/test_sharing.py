"""Several relays share the shards; one that dies or leaves is replaced."""

from __future__ import annotations

import signal
import threading

import pytest

from eoframework import lifecycle
from eoframework.errors import ConfigurationError
from eoframework.relay import RelayWorker
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
    # The lease outlasts the wait below: only giving back can explain that the other one gets the shards.
    first = rig.start(relay_lease=40)
    rig.wait_for(lambda: first.owns() == SHARDS, what="the first relay to own all")
    messages = rig.publish(50)
    rig.start(relay_lease=40)
    rig.wait_for(lambda: rig.sql("SELECT count(*) FROM eo.relay_member") == [(2,)], what="the second relay")
    first.signal(signal.SIGTERM)
    assert first.wait() == 0, first.log()
    messages += rig.publish(50)
    rig.wait_empty(within=30)
    assert rig.sql("SELECT count(*) FROM eo.relay_member") == [(1,)]
    rig.assert_published(messages)


def test_a_pinned_relay_takes_its_shards_and_no_others(rig: Rig) -> None:
    rig.publish(200, keys=40)
    settings = rig.settings
    assert lifecycle.run([RelayWorker(rig.database, settings, only={1, 2})], stop=threading.Event(), once=True) == 0
    assert {row[0] for row in rig.sql("SELECT DISTINCT shard FROM eo.outbox_message")} == {0, 3}
    assert rig.sql("SELECT count(*) FROM eo.relay_member") == [(0,)], "it has no part in the sharing"
    with pytest.raises(ConfigurationError, match="shards 0 to 3"):
        RelayWorker(rig.database, settings, only={4}).start()
