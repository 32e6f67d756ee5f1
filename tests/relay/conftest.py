"""An outbox with its own identity and checkpoint topic, real relay processes, and an independent reader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from eoframework.db.session import Database
from eoframework.settings import Settings
from tests.conftest import MakeTopic
from tests.relay.rig import Rig


@pytest.fixture
def rig(database: Database, settings: Settings, make_topic: MakeTopic, tmp_path: Path) -> Iterator[Rig]:
    """A fresh outbox of 4 shards, its checkpoint topic, and one topic to publish to."""
    made = Rig(database, settings, make_topic("relayed", partitions=3), tmp_path)
    made.mint_identity()
    yield made
    made.end()
