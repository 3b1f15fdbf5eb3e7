"""Collectives in lockstep: what every rank gets, on ring values and on integers, and what mismatches say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn

from hocket.compiler.errors import CollectiveMismatch, InputError, UnsupportedError
from hocket.compiler.layout import coordinate
from hocket.compiler.verify.ring.algebra import Algebra
from hocket.compiler.verify.ring.arithmetic import ring_of
from hocket.compiler.verify.ring.equality import same
from hocket.compiler.verify.ring.interpret import interpret, interpret_ranks
from hocket.runtime.mesh import Mesh

c10d = torch.ops._c10d_functional
MESH = Mesh.parse("dp=2,tp=2")


def graph_of(target: Any, *arguments: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    started = graph.call_function(target, (x, *arguments))
    graph.output((graph.call_function(c10d.wait_tensor.default, (started,)),))
    return fx.GraphModule(nn.Module(), graph)


def run(target: Any, *arguments: Any, integers: bool = False) -> list[list[float]]:
    """Rank i holds [10 i, 10 i + 1]; the results as numbers."""
    algebra = Algebra(ring_of(1559))
    values = [torch.tensor([10 * rank, 10 * rank + 1]) for rank in range(4)]
    given = [[value if integers else algebra.lift(value)] for value in values]
    results = interpret_ranks([graph_of(target, *arguments)], given, MESH, algebra)
    numbers = []
    for (result,) in results:
        if integers:
            numbers.append(result.tolist())
            continue
        found = [n for n in range(-200, 2000) if n % 1 == 0]
        table = {tuple(algebra.lift(float(n)).data.tolist()): n for n in found}
        numbers.append([table[tuple(column)] for column in result.data.T.tolist()])
    return numbers


CASES: dict[str, tuple[tuple[Any, ...], list[list[int]]]] = {
    "sum over tp": ((c10d.all_reduce.default, "sum", "tp"), [[10, 12], [10, 12], [50, 52], [50, 52]]),
    "sum over dp": ((c10d.all_reduce.default, "sum", "dp"), [[20, 22], [40, 42], [20, 22], [40, 42]]),
    "max over tp": ((c10d.all_reduce.default, "max", "tp"), [[10, 11], [10, 11], [30, 31], [30, 31]]),
    "min over dp": ((c10d.all_reduce.default, "min", "dp"), [[0, 1], [10, 11], [0, 1], [10, 11]]),
    "product over tp": ((c10d.all_reduce.default, "product", "tp"), [[0, 11], [0, 11], [600, 651], [600, 651]]),
    "gather over dp": (
        (c10d.all_gather_into_tensor.default, 2, "dp"),
        [[0, 1, 20, 21], [10, 11, 30, 31], [0, 1, 20, 21], [10, 11, 30, 31]],
    ),
    "reduce-scatter over tp": ((c10d.reduce_scatter_tensor.default, "sum", 2, "tp"), [[10], [12], [50], [52]]),
    "all-to-all over tp": ((c10d.all_to_all_single.default, [1, 1], [1, 1], "tp"), [[0, 10], [1, 11], [20, 30], [21, 31]]),
    "broadcast over tp": ((c10d.broadcast.default, 1, "tp"), [[10, 11], [10, 11], [30, 31], [30, 31]]),
}


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_rank_gets_its_share(name: str, integers: bool) -> None:
    arguments, expected = CASES[name]
    assert run(*arguments, integers=integers) == expected


def test_an_average_is_exact() -> None:
    algebra = Algebra(ring_of(1559))
    inputs = [[algebra.lift(torch.tensor([float(rank)]))] for rank in range(4)]
    results = interpret_ranks([graph_of(c10d.all_reduce.default, "avg", "tp")], inputs, MESH, algebra)
    assert same(algebra, results[0][0], algebra.lift(torch.tensor([0.5])))
    assert same(algebra, results[3][0], algebra.lift(torch.tensor([2.5])))


def test_uneven_all_to_all_sends_what_the_others_expect() -> None:
    graphs = [
        graph_of(c10d.all_to_all_single.default, receive, send, "tp") for receive, send in (([2, 1], [2, 1]), ([1, 0], [1, 0]))
    ]
    algebra = Algebra(ring_of(1559))
    inputs = [[torch.tensor([1, 2, 3])], [torch.tensor([4])]]
    results = interpret_ranks(graphs, inputs, Mesh.parse("tp=2"), algebra)
    assert [result[0].tolist() for result in results] == [[1, 2, 4], [3]]
    wrong = [graphs[0], graph_of(c10d.all_to_all_single.default, [2, 0], [1, 0], "tp")]
    with pytest.raises(CollectiveMismatch, match="expect"):
        interpret_ranks(wrong, inputs, Mesh.parse("tp=2"), algebra)


def test_graphs_of_different_ranks_must_meet() -> None:
    algebra = Algebra(ring_of(1559))
    inputs = [[torch.tensor([1])], [torch.tensor([2])]]
    graphs = [graph_of(c10d.all_reduce.default, "sum", "tp"), graph_of(c10d.broadcast.default, 0, "tp")]
    with pytest.raises(CollectiveMismatch, match="next collective"):
        interpret_ranks(graphs, inputs, Mesh.parse("tp=2"), algebra)
    equal = [graphs[0], graph_of(c10d.all_reduce.default, "sum", "tp")]
    assert [r[0].tolist() for r in interpret_ranks(equal, inputs, Mesh.parse("tp=2"), algebra)] == [[3], [3]]


@pytest.mark.parametrize(
    ("target", "arguments"), [(c10d.all_reduce.default, ("sum", "pp")), (c10d.all_gather_into_tensor.default, (3, "tp"))]
)
def test_a_wrong_group_is_refused(target: Any, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(CollectiveMismatch, match="axis"):
        run(target, *arguments)


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="band"):
        run(c10d.all_reduce.default, "band", "tp")


def test_coordinates_are_those_of_the_rank() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    where = graph.call_function(coordinate, ("tp",))
    graph.output((graph.call_function(torch.ops.aten.mul.Tensor, (x, where)),))
    module = fx.GraphModule(nn.Module(), graph)
    results = interpret_ranks([module], [[torch.tensor(5)]] * 4, MESH, Algebra(ring_of(1559)))
    assert [int(result[0]) for result in results] == [0, 5, 0, 5]


def test_an_extension_gives_meaning_to_point_to_point() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(torch.ops.aten.alias.default, (x,)),))
    module = fx.GraphModule(nn.Module(), graph)

    def shift(algebra: Algebra, node: fx.Node, arguments: list[tuple[Any, ...]], mesh: Mesh) -> list[Any]:
        return [arguments[(rank - 1) % mesh.size][0] for rank in range(mesh.size)]

    inputs = [[torch.tensor(rank)] for rank in range(4)]
    found = interpret_ranks([module], inputs, MESH, Algebra(ring_of(1559)), extensions={torch.ops.aten.alias.default: shift})
    assert [int(result[0]) for result in found] == [3, 0, 1, 2]


def test_counts_are_checked_at_the_door() -> None:
    algebra = Algebra(ring_of(1559))
    module = graph_of(c10d.all_reduce.default, "sum", "tp")
    with pytest.raises(InputError, match="4 ranks"):
        interpret_ranks([module], [[torch.tensor(1)]], MESH, algebra)
    with pytest.raises(InputError, match="placeholder"):
        interpret(module, [], algebra)
