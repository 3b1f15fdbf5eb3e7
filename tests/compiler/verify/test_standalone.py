"""``hocket.verify`` by itself: every kind of side, every kind of answer, and bad input that is never called equal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

import hocket
from hocket.compiler.capture import capture
from hocket.compiler.cli.main import main
from hocket.compiler.errors import InputError
from hocket.compiler.verify.report import Status, Verdict

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
X = torch.randn(4, 8)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(x)))


class Rewritten(Network):
    slope = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return F.linear(h * torch.sigmoid(self.slope * h), self.down.weight) + self.down.bias


class Wrong(Rewritten):
    slope = 1.001


class Masked(nn.Module):
    """Holds a constant that is made in the forward pass."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.tensor([self.value] * 8)


def test_a_rewritten_module_is_equal_and_a_wrong_one_is_named_with_both_lines() -> None:
    assert hocket.verify(Network(), Rewritten(), example_args=(X,)).status is Status.EQUAL
    verdict = hocket.verify(Network(), Wrong(), example_args=(X,))
    assert verdict.status is Status.DIFFERENT
    assert "test_standalone.py" in verdict.divergence


def test_constants_of_the_same_name_are_not_taken_for_the_same_values() -> None:
    assert hocket.verify(Masked(2.0), Masked(2.0), example_args=(X,)).status is Status.EQUAL
    assert hocket.verify(Masked(2.0), Masked(3.0), example_args=(X,), level="ring").status is Status.DIFFERENT


def test_a_graph_is_compared_in_the_order_of_the_modules_inputs() -> None:
    def forward(w: Any, b: Any, v: Any, c: Any, x: Any) -> Any:
        h = x @ w.t() + b
        return h * torch.sigmoid(h) @ v.t() + c

    like = [torch.zeros(16, 8), torch.zeros(16), torch.zeros(8, 16), torch.zeros(8), X]
    graph = make_fx(forward)(*like)
    assert hocket.verify(Network(), graph, example_args=(X,), train=False).status is Status.EQUAL
    assert hocket.verify(graph, Network(), example_args=(X,), train=False).status is Status.EQUAL
    assert hocket.verify(graph, graph, example_args=tuple(like)).status is Status.EQUAL
    with pytest.raises(InputError, match=r"expected 6.*train=False"):
        hocket.verify(Network(), graph, example_args=(X,))


def test_a_program_and_a_function_are_sides_too() -> None:
    program = capture(torch.exp, (X,), train=False)
    equal = hocket.verify(program, lambda x: torch.exp(x / 2) ** 2, example_args=(X,), train=False)
    assert equal.status is Status.EQUAL
    assert hocket.verify(program, torch.sin, example_args=(X,), train=False).status is Status.DIFFERENT


# ---- per-rank graphs ----------------------------------------------------------------------------------------------------------


def _rank_graph(build: Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    graph.output((build(graph, x, w),))
    return fx.GraphModule(nn.Module(), graph)


def _product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


def _verify_ranks(graphs: list[fx.GraphModule], **layouts: str) -> Verdict:
    args = (torch.randn(4, 6), torch.randn(6, 5))
    names = {"x": "args[0]", "w": "args[1]", "out": "out"}
    found = {names[name]: text for name, text in layouts.items()}
    return hocket.verify(_product, graphs, example_args=args, mesh="tp=2", layouts=found, train=False)


@pytest.mark.parametrize(("reduce", "status"), [(True, Status.EQUAL), (False, Status.DIFFERENT)])
def test_per_rank_graphs_are_equal_with_their_all_reduce_only(reduce: bool, status: Status) -> None:
    def build(graph: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        partial = graph.call_function(aten.mm.default, (x, w))
        if not reduce:
            return partial
        total = graph.call_function(c10d.all_reduce.default, (partial, "sum", "0"))
        return graph.call_function(c10d.wait_tensor.default, (total,))

    assert _verify_ranks([_rank_graph(build) for _ in range(2)], x="S(1)", w="S(0)").status is status


@pytest.mark.parametrize(("step", "equal"), [(3, True), (2, False)])
def test_offsets_that_differ_from_rank_to_rank_are_read_as_one_program(step: int, equal: bool) -> None:
    def rank(index: int) -> fx.GraphModule:
        def build(graph: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
            start = index * step
            columns = graph.call_function(aten.slice.Tensor, (x, 1, start, start + 3))
            rows = graph.call_function(aten.slice.Tensor, (w, 0, start, start + 3))
            partial = graph.call_function(aten.mm.default, (columns, rows))
            total = graph.call_function(c10d.all_reduce.default, (partial, "sum", "tp"))
            return graph.call_function(c10d.wait_tensor.default, (total,))

        return _rank_graph(build)

    verdict = _verify_ranks([rank(0), rank(1)])
    assert (verdict.status is Status.EQUAL, verdict.refused) == (equal, not equal)


def _stage(index: int, *, meets: bool = True, factor: float = 0.0) -> fx.GraphModule:
    """Rank 0 computes, rank 1 contributes zeros (or a multiple of its own product): different ops on different ranks."""

    def build(graph: fx.Graph, x: fx.Node, w: fx.Node) -> fx.Node:
        made = graph.call_function(aten.mm.default, (x, w))
        if index:
            made = graph.call_function(aten.mul.Tensor, (made, factor))
            if not meets:
                return made
        total = graph.call_function(c10d.all_reduce.default, (made, "sum", "tp"))
        return graph.call_function(c10d.wait_tensor.default, (total,))

    return _rank_graph(build)


def test_ranks_that_run_different_ops_are_proven_in_lockstep() -> None:
    verdict = _verify_ranks([_stage(0), _stage(1)])
    assert verdict.status is Status.EQUAL
    assert "program of its own" in str(verdict)
    assert _verify_ranks([_stage(0), _stage(1, factor=0.5)]).status is Status.DIFFERENT


def test_a_deadlock_between_ranks_is_no_equality() -> None:
    verdict = _verify_ranks([_stage(0), _stage(1, meets=False)])
    assert verdict.status is Status.DIFFERENT
    assert "do not agree on the next collective" in str(verdict)


def test_constants_baked_into_the_graphs_of_ranks_may_differ() -> None:
    def rank(value: float) -> fx.GraphModule:
        root = nn.Module()
        root.register_buffer("scale", torch.full((1,), value))
        graph = fx.Graph()
        x, w = graph.placeholder("x"), graph.placeholder("w")
        scaled = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.mm.default, (x, w)), graph.get_attr("scale")))
        total = graph.call_function(c10d.all_reduce.default, (scaled, "sum", "tp"))
        graph.output((graph.call_function(c10d.wait_tensor.default, (total,)),))
        return fx.GraphModule(root, graph)

    assert _verify_ranks([rank(0.25), rank(0.75)]).status is Status.EQUAL
    assert _verify_ranks([rank(0.25), rank(0.5)]).refused


# ---- DTensor ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[2, 3])
def device_mesh(request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield init_device_mesh("cpu", (request.param,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


class Wide(Network):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class ForgetfulBias(Wide):
    """Adds a replicated bias to every rank's part of a sum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.up(x))
        partial = F.linear(h, self.down.weight.to_local()) + self.down.bias.to_local()
        return funcol.all_reduce(partial, "sum", self.down.weight.device_mesh.get_group())


def test_torchs_tensor_parallelism_is_proven_with_its_backward(device_mesh: DeviceMesh) -> None:
    verdict = hocket.verify(Wide(), parallelize_module(Wide(), device_mesh, PLAN), example_args=(X,))
    assert verdict.status is Status.EQUAL
    assert "on all" in str(verdict)


def test_a_bias_added_on_every_rank_of_a_dtensor_program_is_found(device_mesh: DeviceMesh) -> None:
    verdict = hocket.verify(Wide(), parallelize_module(ForgetfulBias(), device_mesh, PLAN), example_args=(X,), train=False)
    assert verdict.refused


def test_a_plan_that_torch_cannot_run_is_an_input_error(device_mesh: DeviceMesh) -> None:
    with pytest.raises(InputError, match="cannot be traced for rank 0"):
        hocket.verify(Wide(), parallelize_module(Wide(), device_mesh, {"up": ColwiseParallel()}), example_args=(X,))


# ---- bad input ----------------------------------------------------------------------------------------------------------------


def test_other_parameters_shapes_or_outputs_are_different_signatures() -> None:
    for other in (nn.Linear(8, 8), Wide()):
        verdict = hocket.verify(Network(), other, example_args=(X,))
        assert verdict.status is Status.DIFFERENT
        assert verdict.levels[0].level == "signature"
    two = hocket.verify(torch.sin, lambda x: (torch.sin(x), x), example_args=(X,), train=False)
    assert two.status is Status.DIFFERENT


def test_an_op_without_exact_meaning_is_unsupported_though_samples_agree() -> None:
    verdict = hocket.verify(torch.special.bessel_j0, torch.special.bessel_j0, example_args=(X,), train=False)
    assert verdict.status is Status.UNSUPPORTED
    assert "bessel" in str(verdict)


def test_what_is_too_large_to_execute_and_cannot_shrink_is_not_called_equal() -> None:
    like = torch.empty(1 << 12, 1 << 12, device="meta")
    graph = make_fx(lambda x, y: x @ y, tracing_mode="fake")(like, like)
    other = make_fx(lambda x, y: (y.t() @ x.t()).t(), tracing_mode="fake")(like, like)
    verdict = hocket.verify(graph, other, example_args=(like, like))
    assert verdict.status is Status.NOT_CHECKED
    assert "no way to trace" in str(verdict)


def test_large_modules_are_compared_at_small_sizes() -> None:
    x = torch.empty(1 << 22, 8)
    assert hocket.verify(Network(), Rewritten(), example_args=(x,), level="ring").status is Status.EQUAL
    assert hocket.verify(Network(), Wrong(), example_args=(x,), level="ring").status is Status.DIFFERENT


def test_graphs_that_cannot_stand_for_a_program_are_refused() -> None:
    def in_place(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x.add_(1) @ w

    args = (torch.randn(4, 6), torch.randn(6, 5))
    graph = make_fx(in_place)(*args)
    with pytest.raises(InputError, match="changes its input in place"):
        hocket.verify(_product, graph, example_args=args, train=False)
    with pytest.raises(InputError, match="does not run on inputs of shapes"):
        hocket.verify(lambda x, w: x @ w.t(), make_fx(_product)(*args), example_args=(args[0], args[1].t()), train=False)
    with pytest.raises(InputError, match="pass mesh="):
        hocket.verify(_product, [_stage(0), _stage(1)], example_args=args, train=False)
    with pytest.raises(InputError, match="2 ranks"):
        hocket.verify(_product, [_stage(0)] * 3, example_args=args, mesh="tp=2", train=False)
    with pytest.raises(InputError, match="which the programs do not have"):
        hocket.verify(_product, [_stage(0), _stage(1)], example_args=args, mesh="tp=2", layouts={"y": "R"}, train=False)
    with pytest.raises(InputError, match="empty list"):
        hocket.verify(_product, [], example_args=args, mesh="tp=2")
    with pytest.raises(InputError, match="expected a module"):
        hocket.verify(_product, 3, example_args=args)  # type: ignore[arg-type]


def test_the_command_line_compares_two_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "two_nets.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "class A(nn.Module):\n    def forward(self, x):\n        return x.tanh()\n"
        "class B(nn.Module):\n    def forward(self, x):\n        return 2 * torch.sigmoid(2 * x) - 1\n"
        "class C(nn.Module):\n    def forward(self, x):\n        return 2 * torch.sigmoid(x) - 1\n"
    )
    common = ["verify", f"{file}:A", "--input", "3x4", "--json", "--inference", "--against"]
    assert main([*common, f"{file}:B"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "equal"
    assert main([*common, f"{file}:C"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == "different"
