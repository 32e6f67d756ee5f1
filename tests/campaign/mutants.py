"""Planted bugs: one for each protection there is, each a small change of our own source.

A campaign that finds nothing has to show that it can find something: `python -m tests.campaign.mutation` plants them
one by one in a copy and runs the layers that each of them names until one of them objects.
"""

from __future__ import annotations

from tests.campaign.mutants_beginning import BEGINNING
from tests.campaign.mutants_consuming import CONSUMING, FAILING
from tests.campaign.mutants_failing import CALLING, PARKING
from tests.campaign.mutants_kafka import KAFKA
from tests.campaign.mutants_operating import DESK, REPEATING
from tests.campaign.mutants_outbox import DURABLE, OUTBOX
from tests.campaign.mutants_places import PLACES
from tests.campaign.mutants_sending import RELAYING, TRANSFORMING

MUTANTS = (
    *(*CONSUMING, *BEGINNING, *FAILING, *PARKING, *CALLING, *DESK, *REPEATING),
    *(*RELAYING, *OUTBOX, *DURABLE, *TRANSFORMING, *KAFKA, *PLACES),
)
