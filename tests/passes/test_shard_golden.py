"""A two-layer network under tensor parallelism (Megatron-LM, arXiv 1909.08053): before and after, word by word."""

import torch
from lowered_programs import lower, plan_of, program_of

from hocket.compiler.layout import Partial, Replicate, Shard
from hocket.compiler.program import Program, Role, RoleKind
from hocket.compiler.verify.blame import relative_error
from hocket.compiler.verify.lockstep import run_global, run_ranks
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
R, S0, S1, SUM = Replicate(), Shard(0), Shard(1), Partial("sum")

BEFORE = """
x = placeholder
a = placeholder
b = placeholder
mm_default = aten.mm.default(x, a)
relu_default = aten.relu.default(mm_default)
mm_default_1 = aten.mm.default(relu_default, b)
view_default = aten.view.default(mm_default_1, [2, 2, 6])
output((view_default,))
"""

AFTER = """
x = placeholder
a = placeholder
b = placeholder
mm_default = aten.mm.default(x, a)
relu_default = aten.relu.default(mm_default)
mm_default_1 = aten.mm.default(relu_default, b)
contiguous_default = aten.contiguous.default(mm_default_1)
mm_default_1_reduce_scatter_tp = _c10d_functional.reduce_scatter_tensor.default(contiguous_default, sum, 2, tp)
mm_default_1_reduce_scatter_tp_wait = _c10d_functional.wait_tensor.default(mm_default_1_reduce_scatter_tp)
view_default = aten.reshape.default(mm_default_1_reduce_scatter_tp_wait, [1, 2, 6])
output((view_default,))
"""

UNEVEN = """
x = placeholder
coordinate = coordinate(tp)
local_size = local_size(5, 2, coordinate)
padding = padding(local_size, 3)
constant_pad_nd_default = aten.constant_pad_nd.default(x, [0, 0, 0, padding])
contiguous_default = aten.contiguous.default(constant_pad_nd_default)
x_all_gather_tp = _c10d_functional.all_gather_into_tensor.default(contiguous_default, 2, tp)
x_all_gather_tp_wait = _c10d_functional.wait_tensor.default(x_all_gather_tp)
slice_tensor = aten.slice.Tensor(x_all_gather_tp_wait, 0, 0, 5)
contiguous_default_1 = aten.contiguous.default(slice_tensor)
output((contiguous_default_1,))
"""


def _network(graph, x, a, b):
    hidden = graph.call_function(aten.relu.default, (graph.call_function(aten.mm.default, (x, a)),))
    return [graph.call_function(aten.view.default, (graph.call_function(aten.mm.default, (hidden, b)), [2, 2, 6]))]


def _text(program: Program) -> str:
    lines = []
    for node in program.nodes:
        args = ", ".join(map(str, node.args))
        name = getattr(node.target, "__name__", "") if not isinstance(node.target, torch._ops.OpOverload) else str(node.target)
        lines.append({"placeholder": f"{node} = placeholder", "output": f"output({args})"}.get(node.op, f"{node} = {name}({args})"))
    return "\n".join(lines)


def test_a_network_under_tensor_parallelism_keeps_its_ops_and_gains_one_reduce_scatter() -> None:
    program = program_of(_network, {"x": (4, 6), "a": (6, 8), "b": (8, 6)})
    assert _text(program) == BEFORE.strip()
    nodes = {
        "x": ((), ((R,),)),
        "a": ((), ((S1,),)),
        "b": ((), ((S0,),)),
        "mm_default": (((R,), (S1,)), ((S1,),)),
        "relu_default": (((S1,),), ((S1,),)),
        "mm_default_1": (((S1,), (S0,)), ((SUM,),)),
        "view_default": (((S0,),), ((S0,),)),
    }
    lowered = lower(program, plan_of(Mesh.parse("tp=2"), nodes, [(S0,)]))
    assert _text(lowered) == AFTER.strip()
    shapes = {node.name: tuple(node.meta["val"].shape) for node in lowered.nodes if node.op != "output"}
    assert shapes["mm_default"] == (4, 4)
    assert shapes["mm_default_1"] == (4, 6)
    assert shapes["view_default"] == (1, 2, 6)
    inputs = {Role(RoleKind.INPUT, n): torch.randn(p.meta["val"].shape, dtype=torch.float64) for n, p in _inputs(program)}
    (want,) = run_global(program, inputs).outputs.values()
    (have,) = run_ranks(lowered, inputs).outputs.values()
    assert relative_error(want, have) < 1e-12


def _inputs(program: Program):
    return [(node.name, node) for node in program.placeholders]


def test_an_uneven_gather_pads_on_the_wire_and_trims_after_it() -> None:
    program = program_of(lambda graph, x: [x], {"x": (5, 3)})
    lowered = lower(program, plan_of(Mesh.parse("tp=2"), {"x": ((), ((S0,),))}, [(R,)]))
    assert _text(lowered) == UNEVEN.strip()
