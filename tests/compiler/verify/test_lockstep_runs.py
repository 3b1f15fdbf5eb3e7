"""Running all ranks in one process: inputs, replicas, sharing, wide types, and what it refuses."""

import pytest
import torch
import torch.fx as fx
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.errors import CollectiveMismatch, InputError, UnsupportedError, VerificationError
from hocket.compiler.layout import Layout, Partial, Replicate, Shard, coordinate
from hocket.compiler.program import NOTE, Note, Program, Role, RoleKind, Signature
from hocket.compiler.verify.blame import relative_error
from hocket.compiler.verify.lockstep import run_global, run_ranks
from hocket.compiler.verify.together import reduce_values
from hocket.compiler.verify.widen import widen_call
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
X, OUT = Role(RoleKind.INPUT, "x"), Role(RoleKind.OUTPUT, "out")
R, S0, SUM = Replicate(), Shard(0), Partial("sum")


def lowered(function, source: Layout, target: Layout, mesh: str, shape: tuple[int, ...]) -> Program:
    """A program lowered by hand: one input x in ``source``, one output that claims ``target``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    result = function(graph, x)
    graph.output((result,))
    for node in graph.nodes:
        node.meta[NOTE] = Note(source=f"model.py:7 {node.name}")
    x.meta[NOTE] = Note(layouts=(source,), global_shapes=(shape,), source="model.py:3 x")
    if result is not x:
        result.meta[NOTE] = Note(layouts=(target,), source="model.py:7 y = f(x)")
    return Program(fx.GraphModule(nn.Module(), graph), Signature((X,), (OUT,)), mesh=Mesh.parse(mesh))


def _call(target, *args):
    return lambda graph, x: graph.call_function(target, (x, *args))


@pytest.mark.parametrize(
    ("target", "args", "source", "claimed", "expected"),
    [
        (c10d.all_reduce.default, ("sum", "a"), (SUM, R), (R, R), lambda x: x),
        (c10d.all_reduce.default, ("avg", "b"), (R, S0), (R, R), lambda x: x.view(2, 2, 3).mean(0)),
        (c10d.all_reduce.default, ("max", "b"), (R, S0), (R, R), lambda x: x.view(2, 2, 3).amax(0)),
        (c10d.all_gather_into_tensor.default, (2, "b"), (R, S0), (R, R), lambda x: x),
        (c10d.reduce_scatter_tensor.default, ("sum", 2, "a"), (SUM, R), (S0, R), lambda x: x),
        (c10d.all_to_all_single.default, ([1, 1], [1, 1], "a"), (S0, R), (S0, R), lambda x: x[[0, 2, 1, 3]]),
    ],
)
def test_a_collective_joins_the_ranks_of_its_axis_only(target, args, source, claimed, expected) -> None:
    value = torch.randn(4, 3, dtype=torch.float64)
    program = lowered(_call(target, *args), source, claimed, "a=2,b=2", (4, 3))
    assert relative_error(expected(value), run_ranks(program, {X: value}).outputs[OUT]) < 1e-15


def test_replicas_that_differ_are_reported_with_axis_ranks_and_line() -> None:
    program = lowered(_call(aten.relu.default), (R, S0), (R, R), "a=2,b=2", (4, 3))
    value = torch.randn(4, 3).abs()
    message = r"output output:out is R,R on mesh a=2,b=2, but ranks 0 and 1 .*\(from model.py:7 y = f\(x\)\): a reduction over b"
    with pytest.raises(VerificationError, match=message):
        run_ranks(program, {X: value})
    assert run_ranks(program, {X: value}, check_replicas=False).outputs[OUT] is not None


def test_replicas_with_the_same_nans_agree() -> None:
    program = lowered(lambda graph, x: x, (R,), (R,), "a=2", (2,))
    assert torch.isnan(run_ranks(program, {X: torch.full((2,), torch.nan)}).outputs[OUT]).all()


def test_ranks_with_the_same_arguments_share_the_work() -> None:
    program = lowered(_call(aten.relu.default), (R, S0), (R, S0), "a=3,b=2", (4, 3))
    values = run_ranks(program, {X: torch.randn(4, 3)}, record=True).values["relu_default"]
    assert len({id(value) for value in values}) == 2


def test_random_ops_draw_anew_on_every_rank() -> None:
    program = lowered(_call(aten.rand_like.default), (R,), (R,), "a=2", (64,))
    with pytest.raises(VerificationError, match="hold different"):
        run_ranks(program, {X: torch.randn(64)})


def test_every_rank_knows_its_coordinates() -> None:
    program = lowered(
        lambda graph, x: graph.call_function(aten.mul.Tensor, (x, graph.call_function(coordinate, ("b",)))),
        (R, R),
        (SUM, SUM),
        "a=2,b=3",
        (2,),
    )
    assert run_ranks(program, {X: torch.ones(2)}).outputs[OUT].tolist() == [6.0, 6.0]  # 2 * (0 + 1 + 2)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (_call(c10d.reduce_scatter_tensor.default, "sum", 2, "a"), CollectiveMismatch, "multiple of 2 ranks, found 3"),
        (_call(c10d.all_gather_into_tensor.default, 4, "a"), CollectiveMismatch, "group of 2 ranks, found group_size 4"),
        (_call(c10d.all_to_all_single.default, [2, 2], [2, 2], "a"), CollectiveMismatch, "splits of 3 rows"),
        (_call(c10d.broadcast.default, 0, "a"), UnsupportedError, "which no interpreter here knows"),
        (_call(aten.view.default, [5]), VerificationError, r"failed on rank 0 with arguments \(\[3, 2\], \[5\]\)"),
        (
            lambda graph, x: graph.call_function(
                c10d.all_gather_into_tensor.default, (graph.call_function(aten.t.default, (x,)), 2, "a")
            ),
            CollectiveMismatch,
            "expected contiguous tensors",
        ),
    ],
)
def test_what_real_ranks_would_refuse_is_refused_with_the_node_and_its_line(function, error, message) -> None:
    program = lowered(function, (R,), (R,), "a=2", (3, 2))
    with pytest.raises(error, match=message) as caught:
        run_ranks(program, {X: torch.randn(3, 2)})
    assert "model.py:7" in str(caught.value)


def test_pieces_of_different_shapes_never_meet_in_a_collective() -> None:
    program = lowered(_call(c10d.all_reduce.default, "sum", "a"), (S0,), (R,), "a=2", (3, 2))
    with pytest.raises(CollectiveMismatch, match=r"same shape on every rank of the group, found \{0: \(2, 2\), 1: \(1, 2\)\}"):
        run_ranks(program, {X: torch.randn(3, 2)})


def test_missing_and_misshapen_inputs_are_refused_by_role() -> None:
    program = lowered(lambda graph, x: x, (R,), (R,), "a=2", (2,))
    with pytest.raises(InputError, match="expected a value for input input:x, found none"):
        run_ranks(program, {})
    with pytest.raises(InputError, match=r"expected shape \[2\] for input x, found \[3\]"):
        run_ranks(program, {X: torch.randn(3)})
    with pytest.raises(InputError, match="use run_ranks"):
        run_global(program, {X: torch.randn(2)})


def test_autocast_disappears_in_float64() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3), nn.Softmax(-1))
    x = torch.randn(4, 5)

    def step(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x) / torch.full((3,), 3.0)

    with torch.no_grad():
        program = capture(_Wrapped(model, step), (x,), train=False)
    named = {Role(RoleKind.PARAM, n): p.detach() for n, p in _Wrapped(model, step).named_parameters()}
    inputs = {**named, next(r for r in program.signature.inputs if r.kind is RoleKind.INPUT): x}
    (found,) = run_global(program, inputs, torch.float64).outputs.values()
    want = nn.functional.softmax(_double(model[:3], x), -1) / 3
    assert found.dtype is torch.float64
    assert relative_error(want, found) < 1e-14
    assert torch.get_default_dtype() is torch.float32


class _Wrapped(nn.Module):
    def __init__(self, model: nn.Module, step) -> None:
        super().__init__()
        self.model = model
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.step(x)


def _double(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    value = x.double()
    for layer in layers:
        value = (
            nn.functional.linear(value, layer.weight.double(), layer.bias.double())
            if isinstance(layer, nn.Linear)
            else layer(value)
        )
    return value.detach()


def test_looking_at_the_bits_of_a_float_has_no_wide_form() -> None:
    with pytest.raises(UnsupportedError, match="reinterprets the bits"):
        widen_call(aten.view.dtype, (torch.ones(2), torch.int32), {}, torch.float64)


def test_complex_values_widen_to_complex() -> None:
    assert widen_call(aten._to_copy.default, (), {"dtype": torch.complex64}, torch.float64)[2] == {"dtype": torch.complex128}
    assert widen_call(aten._softmax.default, (torch.ones(2), 0, True), {}, torch.float64)[1][2] is False


def test_an_unknown_reduction_is_refused() -> None:
    assert reduce_values([torch.tensor(2.0), torch.tensor(3.0)], "product").item() == 6
    with pytest.raises(UnsupportedError, match="found 'xor'"):
        reduce_values([torch.ones(1), torch.ones(1)], "xor")


def test_views_traced_for_other_strides_run_on_contiguous_inputs() -> None:
    """The tangent of a transposed output is strided in the trace, and the backward views it."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)))
    program = capture(_Transposed(model), (torch.randn(3, 4),))
    inputs = {
        role: torch.randn(node.meta["val"].shape) for role, node in zip(program.signature.inputs, program.placeholders, strict=True)
    }
    assert run_global(program, inputs, torch.float64).outputs


class _Transposed(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).permute(2, 0, 1)
