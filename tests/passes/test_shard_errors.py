"""A plan that does not fit is refused at the door, by name."""

import pytest
import torch
from lowered_programs import lower, plan_of, program_of

from hocket.compiler.contract import Context
from hocket.compiler.errors import HocketError, PlanError
from hocket.compiler.layout import Partial, Replicate, Shard
from hocket.compiler.plan.plan import Plan
from hocket.compiler.program import Program
from hocket.passes.shard import Shard as ShardPass
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
R, S0, S1, SUM = Replicate(), Shard(0), Shard(1), Partial("sum")
MESH = Mesh.parse("a=2")
GOOD = {"x": ((), ((S0,),)), "view_default": (((S0,),), ((S0,),))}


def _program() -> Program:
    return program_of(lambda graph, x: [graph.call_function(aten.view.default, (x, [3, 2, 4]))], {"x": (6, 4)})


def _plan(**changes: object) -> Plan:
    return plan_of(MESH, {**GOOD, **changes}, [(S0,)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relu_7": ((), ((R,),))}, "names 'relu_7', but the program has no such node"),
        (
            {"view_default": ((), ((S0,),))},
            "has 1 tensor arguments, but the plan gives 0 layouts",
        ),
        ({"view_default": (((S0,),), ())}, "has 1 outputs, but the plan gives 0 layouts"),
        ({"view_default": (((S0,),), (None,))}, "is a tensor, but the plan gives it the layout -"),
        ({"view_default": (((S0, R),), ((S0,),))}, "expected one placement per axis of mesh a=2, found S"),
        ({"view_default": (((Shard(2),),), ((S0,),))}, r"layout S\(2\) does not fit shape \[6, 4\]"),
        ({"view_default": (((SUM,),), ((SUM,),))}, r"wants x for view_default .*nothing makes a partial sum"),
        ({"view_default": (((R,),), ((S0,),))}, r"rank 0 has \[6, 4\] and would need \[2, 2, 4\] \(from model.py:1 view_default\)"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        lower(_program(), _plan(**changes))


def test_uneven_pieces_that_do_not_reshape_into_each_other_are_refused_on_the_rank_where_they_differ() -> None:
    with pytest.raises(PlanError, match=r"rank 0 has \[3, 4\] and would need \[2, 2, 4\]"):
        lower(_program(), _plan())


def test_a_plan_that_leaves_a_rank_without_work_is_refused() -> None:
    program = program_of(lambda graph, x: [graph.call_function(aten.relu.default, (x,))], {"x": (6, 4)})
    plan = plan_of(Mesh.parse("a=4"), {"x": ((), ((S0,),)), "relu_default": (((S0,),), ((S0,),))}, [(S0,)])
    with pytest.raises(PlanError, match=r"layout S\(0\) on mesh a=4 leaves some rank nothing of shape \[6, 4\]"):
        lower(program, plan)


def test_missing_entries_results_and_meshes_are_refused() -> None:
    program = _program()
    with pytest.raises(PlanError, match="has no entry for view_default"):
        lower(program, plan_of(MESH, {"x": GOOD["x"]}, [(S0,)]))
    with pytest.raises(PlanError, match="has 1 results, but the plan gives 0 layouts"):
        lower(program, plan_of(MESH, GOOD, []))
    with pytest.raises(PlanError, match=r"result output:out\[0\] is a tensor, but the plan gives it the layout -"):
        lower(program, plan_of(MESH, GOOD, [None]))
    with pytest.raises(PlanError, match="expected a plan for mesh a=4, found one for a=2"):
        lower(program, _plan(), Mesh.parse("a=4"))
    with pytest.raises(PlanError, match="found none"):
        ShardPass()(program, Context(MESH, rules=None, cluster=None))  # type: ignore[arg-type]


def test_a_lowered_program_is_not_lowered_again() -> None:
    program = program_of(lambda graph, x: [x], {"x": (4,)})
    plan = plan_of(MESH, {"x": ((), ((R,),))}, [(R,)])
    with pytest.raises(HocketError, match="already lowered to mesh a=2"):
        lower(lower(program, plan), plan)
