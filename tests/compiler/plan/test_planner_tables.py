"""Planning on small tables never says that nothing is possible before it has tried large ones."""

import itertools

import numpy as np
import pytest
import torch
from planning import CLUSTER, TinyRules, program_of, role

from hocket.compiler.errors import PlanError
from hocket.compiler.plan import planner
from hocket.compiler.plan.elimination import INFINITE, Factor, Infeasible, minimise
from hocket.runtime.mesh import Mesh


def test_a_search_on_split_tables_does_not_claim_a_proof():
    differ = np.where(np.eye(3, dtype=bool), INFINITE, 0).astype(np.int64)
    factors = [Factor(pair, differ) for pair in itertools.combinations(range(4), 2)]  # four variables, three labels, all different
    for max_table, is_proven in ((81, True), (9, False)):
        with pytest.raises(Infeasible) as caught:
            minimise([3] * 4, factors, max_table=max_table)
        assert caught.value.is_proven is is_proven


def test_larger_tables_are_tried_before_a_refusal(monkeypatch):
    sizes = []

    def refusing(domains, factors, *, max_table):
        sizes.append(max_table)
        raise Infeasible(0, is_proven=False)

    def run(x, weight):
        return (torch.ops.aten.mm.default(x, weight),)

    program = program_of(
        run, [(role("input", "x"), torch.ones(8, 8)), (role("param", "w"), torch.ones(8, 8))], [role("output", "y")]
    )
    monkeypatch.setattr(planner, "minimise", refusing)
    with pytest.raises(PlanError):
        planner.plan(program, Mesh.parse("a=2,b=2"), TinyRules(), CLUSTER)
    assert sizes == sorted(set(sizes))
    assert len(sizes) == 3
