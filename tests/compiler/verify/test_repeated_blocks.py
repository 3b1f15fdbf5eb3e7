"""What repeats is judged once, and a copy that differs is not covered by the others: bugs that lie in the 57th block alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.layout import parse_placement
from hocket.compiler.plan.planner import plan
from hocket.compiler.plan.tactics import DataParallel
from hocket.compiler.program import Program, annotate, copy_program, note
from hocket.compiler.verify.levels import Question, ask, ring_level, types_level
from hocket.compiler.verify.report import Status
from hocket.compiler.verify.templates import Hole, Templates
from hocket.compiler.verify.types import Type, check_types, erase
from hocket.compiler.verify.types.repeats import Repeats
from hocket.passes.shard import Shard
from hocket.runtime.mesh import Mesh
from hocket.testing.models import CASES, TABLE, lowered

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
BLOCK = "layers.56"


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(60))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * 0.5
        return x.square().mean()


@pytest.fixture(scope="module")
def deep() -> tuple[Program, Program]:
    """(60 blocks, the same on two ranks)."""
    mesh, cluster = Mesh((("dp", 2),)), Cluster.default()
    program = capture(Deep(), (torch.randn(4, 4),))
    chosen = plan(program, mesh, TABLE, cluster, [DataParallel("dp")])
    return program, Shard()(program, Context(mesh, TABLE, cluster, chosen))


def in_block(program: Program, target: object) -> fx.Node:
    """The first call of an op in the 57th block."""
    return next(n for n in program.nodes if n.target is target and note(n).module.startswith(BLOCK))


def other_factor(program: Program) -> None:
    tanh = in_block(program, aten.addmm.default).next
    while tanh.target is not aten.mul.Tensor and tanh.target is not aten.mul.Scalar:
        tanh = tanh.next
    tanh.args = (tanh.args[0], 0.25)


def other_source(program: Program) -> None:
    """The block multiplies what enters the first one."""
    first = next(n for n in program.nodes if n.target is aten.addmm.default)
    block = in_block(program, aten.addmm.default)
    block.args = (block.args[0], first.args[1], block.args[2])


def bias_of_the_block_before(program: Program) -> None:
    block = in_block(program, aten.addmm.default)
    before = next(n for n in program.nodes if n.target is aten.addmm.default and note(n).module.startswith("layers.55"))
    block.args = (before.args[0], *block.args[1:])


def lost_reduction(program: Program) -> None:
    """The gradient of its weight is not summed."""
    position = next(i for i, role in enumerate(program.signature.outputs) if str(role) == f"gradient:{BLOCK}.weight")
    node = program.results[position]
    while node is not None and node.target is not c10d.all_reduce.default:
        node = node.all_input_nodes[0]
    assert node is not None
    node.replace_all_uses_with(node.all_input_nodes[0])


def wrong_declaration(program: Program) -> None:
    annotate(in_block(program, aten.addmm.default), layouts=((parse_placement("S(1)"),),))


@pytest.mark.parametrize(
    ("bug", "status"),
    [
        (other_factor, Status.DIFFERENT),
        pytest.param(other_source, Status.DIFFERENT, marks=pytest.mark.slow),
        pytest.param(bias_of_the_block_before, Status.DIFFERENT, marks=pytest.mark.slow),
        (lost_reduction, Status.ILL_TYPED),
        (wrong_declaration, Status.ILL_TYPED),
    ],
)
def test_a_bug_in_the_57th_block_alone_is_refused(
    deep: tuple[Program, Program], bug: Callable[[Program], None], status: Status
) -> None:
    program, sharded = deep
    wrong, _ = copy_program(sharded)
    bug(wrong)
    verdict = ask(Question(program, wrong), (types_level, ring_level))
    assert verdict.status is status, verdict
    if status is Status.ILL_TYPED:
        assert BLOCK in str(verdict) or "self.layers" in str(verdict) or "layer(x)" in str(verdict)


def test_without_a_bug_all_sixty_blocks_are_equal_by_what_they_share(deep: tuple[Program, Program]) -> None:
    program, sharded = deep
    verdict = ask(Question(program, sharded), (types_level, ring_level))
    assert verdict.status is Status.EQUAL
    assert "op for op" in verdict.levels[-1].detail


def test_the_blocks_share_their_judgements(deep: tuple[Program, Program]) -> None:
    report = check_types(deep[1], deep[0])
    assert report.status == "typed"
    assert len({id(op) for op in report.typed.values()}) < report.ops / 4


def described(types: object) -> object:
    if isinstance(types, Type):
        return (types.dims, types.partial, types.zero, types.scaled)
    return tuple(map(described, types)) if isinstance(types, (tuple, list)) else str(types)


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (i % 3 > 0)) for i, case in enumerate(CASES)])
def test_judging_every_node_anew_says_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, parallel = lowered(case)
    once = check_types(parallel, program)
    monkeypatch.setattr(Repeats, "key", lambda *_, **__: None)
    anew = check_types(parallel, program)
    assert {n: described(t) for n, t in once.types.items()} == {n: described(t) for n, t in anew.types.items()}
    assert (once.problems, once.untyped) == (anew.problems, anew.untyped)
    assert len({id(op) for op in anew.typed.values()}) == len(anew.typed)
    if once.status == "typed":
        lines = [str(erase(parallel, report).graph.graph) for report in (once, anew)]
        assert lines[0] == lines[1]


def test_a_value_indexed_by_itself_is_not_judged_like_one_indexed_by_another() -> None:
    graph, templates = fx.Graph(), Templates()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    calls = [graph.call_function(aten.index.Tensor, (x, [i])) for i in (x, y)]
    for node in (x, y, *calls):
        node.meta["val"] = torch.zeros(3, dtype=torch.bool)
    repeats = Repeats({})
    repeats.states = {x: 0, y: 0}
    keys = []
    for node in calls:
        template, operands = templates.of(node.target, node.args, node.kwargs)
        keys.append(repeats.key(node, note(node), template, operands, flipped=False))
    assert keys[0] != keys[1]


def test_nothing_is_remembered_of_operands_without_a_state() -> None:
    graph, templates = fx.Graph(), Templates()
    x = graph.placeholder("x")
    call = graph.call_function(aten.neg.default, (x,))
    repeats = Repeats({})
    repeats.forget(x)
    template, operands = templates.of(call.target, call.args, call.kwargs)
    assert repeats.key(call, note(call), template, operands, flipped=False) is None


LEAVES = st.one_of(
    st.integers(-2, 2), st.sampled_from([0.0, -0.0, 1.0]), st.booleans(), st.none(), st.sampled_from([Hole(0), Hole(1)])
)
ARGUMENTS = st.lists(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3), max_leaves=5), max_size=4)


@settings(deadline=None, max_examples=100)
@given(ARGUMENTS, ARGUMENTS)
def test_a_call_is_its_template_filled_with_its_operands(first: list[object], second: list[object]) -> None:
    templates = Templates()
    found = [templates.of(aten.cat.default, tuple(args), {}, Hole) for args in (first, second)]
    for (template, operands), args in zip(found, (first, second), strict=True):
        filled, _ = template.filled(operands)
        assert repr(filled) == repr(tuple(args))
    assert (found[0] == found[1]) == (repr(first) == repr(second))
