"""A slice of Kafka's own test of its transactions; the whole is `python -m tests.transform.copier_campaign`."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Addresses
from tests.transform.copier_campaign import open_campaign


def test_killed_copiers_copy_each_message_once_and_in_order(services: Addresses, template: str, tmp_path: Path) -> None:
    """Seen to fail with the group's offsets in a Kafka transaction of their own after that of the outputs
    (`Transformer._commit`): messages copied twice.
    """
    with open_campaign(services, tmp_path, messages=10_000, template=template) as campaign:
        campaign.fill()
        campaign.run(kills=3)
        campaign.check()
    assert len(campaign.kills) == 3
    assert min(campaign.kills) >= 0.2
