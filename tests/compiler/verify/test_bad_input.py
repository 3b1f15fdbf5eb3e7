"""What cannot be compared gets a clear verdict or a clear error, and is never called equal."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import hocket
from hocket.compiler.errors import CaptureError, HocketError, InputError
from hocket.compiler.program import Program
from hocket.compiler.verify.apart import run_apart
from hocket.compiler.verify.ranks import RankGraphs
from hocket.compiler.verify.report import Status
from hocket.compiler.verify.samples import sample_inputs
from hocket.compiler.verify.standalone import verify
from hocket.testing.handwritten.catalogue import PROGRAMS, lowered_program, reference_program
from hocket.testing.handwritten.ring_attention import ring_attention

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
X = torch.randn(4, 6)


def _asked(original: Any, transformed: Any, *args: Tensor, **settings: Any) -> Any:
    return hocket.verify(original, transformed, example_args=args, train=False, **settings)


def _branching(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def _with_attribute() -> fx.GraphModule:
    root = nn.Module()
    root.weight = nn.Parameter(torch.ones(6))
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(aten.mul.Tensor, (x, graph.get_attr("weight"))),))
    return fx.GraphModule(root, graph)


def _in_place(x: Tensor) -> Tensor:
    return x.mul_(2)


def _joined() -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    total = graph.call_function(c10d.all_reduce.default, (x, "sum", "d"))
    graph.output((graph.call_function(c10d.wait_tensor.default, (total,)),))
    return fx.GraphModule(nn.Module(), graph)


REFUSED: dict[str, tuple[Callable[[], Any], type[HocketError], str]] = {
    "a branch on values": (lambda: _asked(torch.sin, _branching, X), CaptureError, "if x.sum|x if x.sum"),
    "a graph that changes its input": (
        lambda: _asked(torch.sin, make_fx(_in_place)(X), X),
        InputError,
        "changes its input in place",
    ),
    "a graph with parameters of its own": (lambda: _asked(torch.sin, _with_attribute(), X), InputError, "make parameters inputs"),
    "collectives without a mesh": (lambda: _asked(torch.sin, _joined(), X), InputError, "pass mesh="),
    "an original with collectives": (
        lambda: _asked(_joined(), torch.sin, X, mesh="d=2"),
        InputError,
        "joins ranks; pass mesh=",
    ),
    "graphs for other ranks": (lambda: _asked(torch.sin, [_joined()] * 3, X, mesh="d=2"), InputError, "each of the 2 ranks"),
    "a layout with another number of axes": (
        lambda: _asked(torch.sin, [_joined()] * 2, X, mesh="d=2", layouts={"args[0]": "S(0),R"}),
        InputError,
        "one placement for each axis",
    ),
    "a layout of what is not there": (
        lambda: _asked(torch.sin, [_joined()] * 2, X, mesh="d=2", layouts={"y": "R"}),
        InputError,
        "which the programs do not have",
    ),
    "an unknown level": (lambda: _asked(torch.sin, torch.sin, X, level="sure"), InputError, "expected a verification level among"),
    "no module at all": (lambda: _asked(torch.sin, "sin", X), InputError, "expected a module, function, Program or graph"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sides_that_cannot_be_compared_are_an_error_in_one_sentence(name: str) -> None:
    ask, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        ask()


SIGNATURES: dict[str, tuple[Any, Any, str]] = {
    "another number of outputs": (torch.sin, lambda x: (torch.sin(x), x), "outputs of the transformed program only"),
    "another output shape": (torch.sin, lambda x: torch.sin(x).t(), "shape"),
    "another parameter": (nn.Linear(6, 6), nn.Linear(6, 6, bias=False), "param:bias"),
    "another parameter shape": (nn.Linear(6, 6), nn.Linear(6, 5), r"\[6, 6\].*\[5, 6\]"),
    "another parameter dtype": (nn.Linear(6, 6), nn.Linear(6, 6).double(), "float64"),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_other_signatures_are_different_and_named(name: str) -> None:
    original, transformed, words = SIGNATURES[name]
    x = X.double() if "dtype" in name else X
    args = (x,)
    if "dtype" in name:
        original = nn.Linear(6, 6)
        args = (X,)
        transformed = _Cast()
    verdict = hocket.verify(original, transformed, example_args=args, train=False, level="ring")
    assert verdict.status is Status.DIFFERENT
    assert re.search(words, str(verdict)), str(verdict)


class _Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6).double()), nn.Parameter(torch.randn(6).double())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.double(), self.weight, self.bias).float()


def test_a_program_that_divides_by_zero_on_every_draw_is_not_equal() -> None:
    verdict = _asked(lambda x: x, lambda x: x / (x - x) * (x - x), X, level="ring")
    assert verdict.status is not Status.EQUAL
    assert "divides by zero" in str(verdict)


def test_a_rank_that_fails_alone_is_different_with_its_node_and_rank() -> None:
    reference = reference_program(PROGRAMS["ring attention"]())
    lowered = lowered_program(PROGRAMS["ring attention"]())
    assert isinstance(lowered, RankGraphs)
    _break_view(lowered)
    verdict = verify(reference, lowered, level="ring")
    assert verdict.status is Status.DIFFERENT
    assert "the program of rank 1 cannot be executed" in str(verdict)


def _break_view(program: RankGraphs) -> None:
    node = next(n for n in program.graphs[1].graph.nodes if n.target is aten.view.default)
    node.args = (node.args[0], [7, 7])


def test_ranks_of_different_programs_run_in_floating_point_too() -> None:
    written = ring_attention()
    reference, lowered = reference_program(written), lowered_program(written)
    assert isinstance(lowered, RankGraphs)
    inputs = sample_inputs(reference, 1)
    found = run_apart(lowered, inputs, dtype=torch.float64).outputs
    for role, expected in _outputs(reference, inputs).items():
        assert torch.allclose(found[role], expected, rtol=1e-9, atol=1e-12), role


def _outputs(program: Program, inputs: Any) -> Any:
    from hocket.compiler.verify.lockstep import run_global

    return run_global(program, inputs, torch.float64).outputs
