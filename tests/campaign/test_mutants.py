"""Each planted bug still has its place in the source: a gate whose bugs cannot be planted finds nothing."""

from __future__ import annotations

import ast

import pytest

from tests.campaign.mutant import LAYERS, Mutant
from tests.campaign.mutants import MUTANTS
from tests.campaign.mutation import planted
from tests.processes import REPOSITORY


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_it_can_be_planted(mutant: Mutant) -> None:
    assert mutant.layers
    for path, before, _ in mutant.changes:
        source = (REPOSITORY / path).read_text()
        assert source.count(before) == 1, path
        assert ast.dump(ast.parse(planted(source, mutant, path))) != ast.dump(ast.parse(source))


def test_every_layer_is_there() -> None:
    assert [
        name for files in LAYERS.values() for name in files if not (REPOSITORY / name.partition("::")[0]).exists()
    ] == []
