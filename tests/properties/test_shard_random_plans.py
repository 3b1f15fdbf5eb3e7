"""Whatever valid plan a program is lowered by, all ranks together compute what one device computes."""

from __future__ import annotations

import functools
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.errors import PlanError
from hocket.compiler.program import Program, check_program, note
from hocket.compiler.verify.blame import blame, relative_error
from hocket.compiler.verify.lockstep import run_global, run_ranks
from hocket.passes.shard import Shard
from hocket.runtime.mesh import Mesh
from hocket.testing.random_plans import context, random_inputs, random_plan

MESHES = ["a=2", "a=3", "a=4", "a=2,b=2", "a=2,b=3"]

KINDS = ("linear", "gelu", "relu", "softmax", "norm", "attention", "transpose", "fold", "mean", "gate", "residual", "reduce_max")


class Chain(nn.Module):
    """Layers drawn by name, on [batch, sequence, width]."""

    def __init__(self, kinds: tuple[str, ...], width: int, heads: int, *, embed: bool) -> None:
        super().__init__()
        self.kinds, self.heads = kinds, heads
        self.table = nn.Embedding(4, width) if embed else None
        self.linears = nn.ModuleList(nn.Linear(width, width) for kind in kinds if kind in ("linear", "residual", "gate"))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for kind in kinds if kind == "norm")
        self.projections = nn.ModuleList(nn.Linear(width, 3 * width) for kind in kinds if kind == "attention")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.table(x) if self.table is not None else x
        linears, norms, projections = iter(self.linears), iter(self.norms), iter(self.projections)
        for kind in self.kinds:
            match kind:
                case "linear":
                    x = next(linears)(x)
                case "residual":
                    x = x + torch.tanh(next(linears)(x))
                case "gate":
                    x = x * torch.sigmoid(next(linears)(x))
                case "norm":
                    x = next(norms)(x)
                case "attention":
                    x = x + self._attend(next(projections)(x))
                case _:
                    x = _plain(kind, x)
        return x

    def _attend(self, qkv: torch.Tensor) -> torch.Tensor:
        batch, sequence, width = qkv.shape
        q, k, v = (t.view(batch, sequence, self.heads, -1).transpose(1, 2) for t in qkv.split(width // 3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(batch, sequence, width // 3)


def _plain(kind: str, x: torch.Tensor) -> torch.Tensor:
    batch, sequence, width = x.shape
    match kind:
        case "gelu":
            return F.gelu(x)
        case "relu":
            return F.relu(x)
        case "softmax":
            return x.softmax(-1)
        case "transpose":
            return x.transpose(0, 1)
        case "fold":
            return (x.reshape(batch * sequence, width) * 2).view(batch, sequence, width)
        case "mean":
            return x - x.mean((0, 1), keepdim=True)
        case "reduce_max":
            return x - x.amax(-1, keepdim=True)
    raise AssertionError(kind)


@functools.lru_cache(maxsize=64)
def _program(kinds: tuple[str, ...], shape: tuple[int, int, int], heads: int, embed: bool) -> Program:
    torch.manual_seed(0)
    batch, sequence, width = shape
    x = torch.randint(0, 4, (batch, sequence)) if embed else torch.randn(shape, requires_grad=True)
    return capture(Chain(kinds, width, heads, embed=embed), (x,))


def _check(program: Program, mesh: Mesh, seed: int) -> int:
    """Lower by one random plan and compare every output and gradient in float64; the number of collectives."""
    plan = random_plan(program, mesh, random.Random(seed))
    try:
        lowered = Shard()(program, context(plan))
    except PlanError as error:  # rules are chosen axis by axis: two cuts that each reshape evenly may not do so together
        if len(mesh.axes) == 1 or "the plan reshapes pieces that do not match" not in str(error):
            raise
        return 0
    check_program(lowered)
    inputs = random_inputs(program, seed)
    want = run_global(program, inputs, torch.float64).outputs
    have = run_ranks(lowered, inputs, dtype=torch.float64, record=True)
    for role, value in want.items():
        assert relative_error(value, have.outputs[role]) < 1e-9, f"{role}: {blame(program, lowered, inputs)}"
    for node in lowered.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert tuple(value.shape) == tuple(have.values[node.name][0].shape), f"{node.name} from {note(node).source}"
    return len(lowered.decisions) - len(program.decisions)


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4).map(tuple),
    shape=st.tuples(st.integers(2, 6), st.integers(2, 7), st.sampled_from([4, 6, 12])),
    heads=st.sampled_from([1, 2]),
    embed=st.booleans(),
    mesh=st.sampled_from(MESHES),
    seed=st.integers(0, 1 << 20),
)
@settings(
    deadline=None,
    max_examples=25,
    phases=[Phase.explicit, Phase.generate],  # every example traces a model: shrinking would take minutes
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
def test_a_random_program_under_a_random_plan_computes_the_same_outputs_and_gradients(
    kinds: tuple[str, ...], shape: tuple[int, int, int], heads: int, embed: bool, mesh: str, seed: int
) -> None:
    _check(_program(kinds, shape, heads, embed), Mesh.parse(mesh), seed)


BLOCK = ("norm", "attention", "residual", "gate", "softmax")


@pytest.mark.parametrize("mesh", MESHES)
def test_a_transformer_block_computes_the_same_under_many_plans(mesh: str) -> None:
    program = _program(BLOCK, (4, 6, 12), 2, False)
    sent = [_check(program, Mesh.parse(mesh), seed) for seed in range(3)]
    assert max(sent) > 10


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*MESHES, "a=2,b=2,c=2"])
def test_odd_sizes_compute_the_same_under_many_more_plans(mesh: str) -> None:
    for shape in [(5, 7, 12), (3, 8, 6), (4, 5, 4)]:
        program = _program(BLOCK, shape, 2, True)
        for seed in range(8):
            _check(program, Mesh.parse(mesh), seed)
