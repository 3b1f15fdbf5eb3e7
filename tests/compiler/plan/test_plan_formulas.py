"""Formulas of the named sizes give the planner's own figures, here and at other sizes."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hocket
from hocket.compiler.capture import capture
from hocket.compiler.cli.main import main
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.cost.symbols import symbols
from hocket.compiler.doors.hall import Compiled, Options, compile_program
from hocket.compiler.plan.formulas import cost_formulas, dimension, name_dimensions
from hocket.compiler.retrace import Retrace
from hocket.runtime.mesh import Mesh

SIZES = [{"B": 6, "S": 35}, {"B": 4, "S": 11}, {"B": 10, "S": 26}]


class Attention(nn.Module):
    """Its width is its batch in one of the calls below, so that a size alone does not tell what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(x)
        return (torch.softmax(hidden @ x.transpose(1, 2), -1) @ x).mean()


def _compiled(batch: int, length: int) -> tuple[Compiled, Retrace]:
    model, args = Attention(), (torch.zeros(batch, length, 8),)
    options = Options(Mesh.parse("dp=2"), tactics=[hocket.DataParallel("dp")], level="off", cluster=Cluster.default())
    program = capture(model, args, sizes={"args[0]": ("B", "S", None)})

    def again(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
        return capture(model, args, kwargs, sizes={"args[0]": ("B", "S", None)})

    retrace = Retrace(model, args, {}, step=again)
    return compile_program(program, options, retrace=retrace), retrace


@pytest.mark.parametrize("sizes", [(8, 24), (8, 40)], ids=str)
def test_formulas_of_one_batch_are_the_figures_of_another(sizes: tuple[int, int]) -> None:
    (compiled, retrace), (other, _) = _compiled(*sizes), _compiled(16, 64)
    formulas = cost_formulas(compiled.program, compiled.plan, Cluster.default(), retrace)
    assert formulas is not None
    named = symbols(compiled.program.sizes)
    for one in (compiled, other):
        at = {named[name]: size for name, size in one.program.sizes.items()}
        for field in dataclasses.fields(formulas):
            value = sympy.sympify(getattr(formulas, field.name)).subs(at)
            assert float(value) == pytest.approx(float(getattr(one.plan.cost, field.name)), rel=1e-6), field.name


def test_where_the_program_depends_on_its_sizes_there_is_no_formula() -> None:
    def folded(x: Tensor) -> Tensor:
        for _ in range(x.shape[0]):
            x = x * 2
        return x

    args = (torch.zeros(6),)
    program = capture(folded, args)
    options = Options(Mesh.parse("d=2"), level="off", cluster=Cluster.default())
    compiled = compile_program(program, options)
    assert cost_formulas(program, compiled.plan, Cluster.default(), Retrace(folded, args, {})) is None


def test_every_dimension_of_every_node_is_named_and_the_program_is_left_alone() -> None:
    compiled, _ = _compiled(8, 24)
    others = [other for capture_at in compiled.smaller if (other := capture_at()) is not None]
    named = name_dimensions(compiled.program, others)
    assert named is not None
    symbol = symbols(compiled.program.sizes)
    for old, new in zip(compiled.program.nodes, named.nodes, strict=True):
        if old.op == "output":
            continue
        assert old.meta["hocket"].shapes is None
        for found in (compiled.program, *others):
            node = found.nodes[compiled.program.nodes.index(old)]
            at = {symbol[name]: size for name, size in found.sizes.items()}
            (shape,) = new.meta["hocket"].shapes
            assert tuple(int(size.subs(at)) for size in shape) == tuple(node.meta["val"].shape)


@given(
    st.sets(st.sampled_from("BS")),
    st.fractions(min_value=1, max_value=50, max_denominator=1),
    st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_a_dimension_is_found_from_three_sizes(names: set[str], factor: object, offset: int) -> None:
    symbol = symbols(SIZES[0])
    wanted = int(factor) * sympy.Mul(*(symbol[name] for name in sorted(names)))
    if len(names) == 1:
        wanted += offset
    found = [int(wanted.subs({symbol[name]: size for name, size in one.items()})) for one in SIZES]
    assert sympy.expand(dimension(found, SIZES) - wanted) == 0


def test_a_dimension_that_follows_no_rule_has_no_expression() -> None:
    assert dimension([7, 1, 2], SIZES) is None


def test_the_command_line_prints_them(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "formula_model.py"
    path.write_text("from torch import nn\n\ndef make():\n    return nn.Linear(8, 16)\n")
    arguments = ["plan", f"{path}:make", "--mesh", "dp=2", "--tactic", "DataParallel(dp)", "--input", "6x8", "--formulas"]
    assert main(arguments) == 0
    assert "flops = 256*B" in capsys.readouterr().out
