"""Planted bugs: one for each protection there is, each a small change of our own source.

A campaign that finds nothing has to show that it can find something: `python -m tests.campaign.mutation` plants them
one by one in a copy and runs the layers that each of them names until one of them objects.
"""

from __future__ import annotations

from tests.campaign.mutants_consuming import CONSUMING, FAILING
from tests.campaign.mutants_places import PLACES
from tests.campaign.mutants_sending import RELAYING, TRANSFORMING

MUTANTS = (*CONSUMING, *FAILING, *RELAYING, *TRANSFORMING, *PLACES)
