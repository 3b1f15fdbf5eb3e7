"""User constraints are obeyed, and what cannot be is refused with both sides named."""

import pytest
import torch
from planning import CLUSTER, TinyRules, program_of, role

from hocket.compiler.errors import PlanError
from hocket.compiler.layout import Partial, Replicate, Shard
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.tactics import DataParallel, TensorParallel, Zero
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program():
    def run(x, w1, w2, seen):
        hidden = aten.mm.default(x, w1)
        return aten.mm.default(hidden, w2), aten.add.Tensor(seen, hidden)

    names = [("input", "args[0]"), ("param", "layers.0.weight"), ("param", "layers.1.weight"), ("buffer", "seen")]
    inputs = [(role(*name), torch.ones(8, 8)) for name in names]
    return program_of(run, inputs, [role("output", "y"), role("update", "seen")])


def layouts(program, constraints, mesh="tp=2", **options):
    found = plan(program, Mesh.parse(mesh), TinyRules(), CLUSTER, options.pop("tactics", "auto"), constraints, **options)
    return [found.nodes[n.name].outputs[0] for n in program.placeholders], found


@pytest.mark.parametrize("wanted", [{"tp": Shard(1)}, {"tp": "S(1)"}, "tp:S(1)", {"tp": Shard(-1)}, (Shard(1),)])
def test_constraints_are_obeyed_however_they_are_written(program, wanted):
    (_, first, second, _), found = layouts(program, {"layers.*.weight": wanted})
    assert first == second == (Shard(1),)
    assert any("fixed by constraint 'layers.*.weight': tp:S(1)" in d.reason for d in found.decisions)


def test_names_with_brackets_are_names_first(program):
    assert layouts(program, {"args[0]": "tp:S(1)"})[0][0] == (Shard(1),)


def test_several_axes_in_one_text(program):
    assert layouts(program, {"layers.0.weight": "a:S(1),b:R"}, "a=2,b=2")[0][1] == (Shard(1), Replicate())


def test_an_updated_buffer_leaves_as_it_came(program):
    for placement in (Shard(0), Shard(1), Replicate()):
        (*_, seen), found = layouts(program, {"seen": {"tp": placement}})
        assert seen == found.results[1] == (placement,)


def test_outputs_can_be_asked_for_whole(program):
    assert layouts(program, {"layers.1.weight": "tp:S(1)"}, outputs="replicate")[1].results[0] == (Replicate(),)


@pytest.mark.parametrize(
    ("constraints", "options", "message"),
    [
        ({"layers.0.weihgt": "tp:R"}, {}, r"'layers.0.weihgt' matches no parameter.*layers.0.weight"),
        ({"seen": "pt:R"}, {}, r"mesh tp=2 has no axis 'pt'"),
        ({"seen": "S(0)"}, {}, r"expected axis:placement, such as tp:S\(0\); found 'S\(0\)'"),
        ({"seen": "tp:S(2)"}, {}, r"S\(2\) is outside its 2 dimensions"),
        ({"seen": "tp:banana"}, {}, r"expected R or S\(dim\) on axis tp; found 'banana'"),
        ({"seen": {"tp": Partial("sum")}}, {}, r"cannot be a partial sum"),
        ({"layers.*": "tp:R", "layers.0.weight": "tp:S(0)"}, {}, r"'layers.\*'.*for R, but .*'layers.0.weight'.*for S\(0\)"),
        ({"layers.0.weight": "tp:S(0)"}, {"tactics": [DataParallel("tp")]}, r"'layers.0.weight'.*S\(0\).*DataParallel.*for R"),
        ({}, {"tactics": [DataParallel("dp")]}, r"has no axis 'dp'"),
        ({}, {"tactics": [DataParallel("tp"), TensorParallel("tp")]}, r"two tactics for axis tp"),
        ({}, {"tactics": [Zero("tp", stage=1)]}, r"stage 1 cuts optimizer state, but this program holds no optimizer"),
        ({}, {"tactics": [Zero("tp", stage=2)], "gradients": "like-params"}, r'stage 2.*"like-params"'),
        ({}, {"tactics": [Zero("tp", stage=4)]}, r"stages 1, 2 and 3"),
        ({}, {"tactics": "best"}, r'tactics must be "auto"'),
    ],
)
def test_what_cannot_be_is_refused_with_both_sides(program, constraints, options, message):
    with pytest.raises(PlanError, match=message):
        layouts(program, constraints, **options)


def test_too_small_a_batch_is_refused(program):
    with pytest.raises(PlanError, match=r"input:args\[0\] on axis dp: .*its shape \[8, 8\] over 16 ranks"):
        layouts(program, {}, "dp=16", tactics=[DataParallel("dp")])


@pytest.fixture(scope="module")
def odd_program():
    def run(x, weight):
        return (aten.mm.default(x, weight),)

    inputs = [(role("input", "x"), torch.ones(8, 1)), (role("param", "weight"), torch.ones(1, 13))]
    return program_of(run, inputs, [role("output", "y")])


def test_zero_yields_where_a_dimension_cannot_be_cut_twice(odd_program):
    (_, weight), _ = layouts(odd_program, {}, "dp=2,tp=2", tactics=[Zero("dp"), TensorParallel("tp")])
    assert weight == (Replicate(), Shard(1))


def test_zero_yields_to_a_constraint_on_another_axis(odd_program):
    (_, weight), _ = layouts(odd_program, {"weight": "tp:S(1)"}, "dp=2,tp=2", tactics=[Zero("dp")])
    assert weight == (Replicate(), Shard(1))
