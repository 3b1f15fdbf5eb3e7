"""Placement types over random plans: no false alarm on any lowering, and erasing a typed one gives the original back."""

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.errors import PlanError
from hocket.compiler.program import Program
from hocket.compiler.verify.differential import compare_programs
from hocket.compiler.verify.types import check_types, erase
from hocket.passes.shard import Shard
from hocket.runtime.mesh import Mesh
from hocket.testing.random_plans import context, random_plan


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(F.gelu(self.first(self.norm(x)))).square().mean()


class Attention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.table = heads, nn.Embedding(12, width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        b, s, d = x.shape
        q, k, v = (f(x).view(b, s, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, d)
        return F.log_softmax(x + self.out(mixed), -1).amax()


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return self.head(F.avg_pool2d(self.second(hidden), 2).mean((2, 3)))


def programs() -> dict[str, Program]:
    torch.manual_seed(0)
    return {
        "mlp": capture(Mlp(), (torch.randn(4, 6, 8),)),
        "odd-mlp": capture(Mlp(), (torch.randn(5, 3, 8),)),
        "attention": capture(Attention(), (torch.randint(0, 12, (4, 6)),)),
        "odd-attention": capture(Attention(), (torch.randint(0, 12, (3, 5)),)),
        "convolution": capture(Convolution(), (torch.randn(4, 4, 8, 8),)),
    }


PROGRAMS = programs()


@pytest.mark.parametrize("name", PROGRAMS)
@settings(deadline=None, max_examples=6, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 20), mesh=st.sampled_from(["a=2", "a=3", "a=4", "a=2,b=2", "a=2,b=1"]))
def test_lowered_programs_raise_no_alarm_and_erase_to_the_original(name: str, seed: int, mesh: str) -> None:
    original = PROGRAMS[name]
    plan = random_plan(original, Mesh.parse(mesh), random.Random(seed))
    try:
        lowered = Shard()(original, context(plan))
    except (PlanError, ValueError):
        return
    report = check_types(lowered, original)
    assert not report.problems, report.problems[0]
    if report.status == "typed":
        assert compare_programs(original, erase(lowered, report), growth=False).differences == ()


@pytest.mark.parametrize("name", PROGRAMS)
def test_lowerings_over_one_axis_are_typed_to_the_last_op(name: str) -> None:
    original, typed = PROGRAMS[name], 0
    for seed in range(4):
        try:
            lowered = Shard()(original, context(random_plan(original, Mesh.parse("a=2"), random.Random(seed))))
        except (PlanError, ValueError):
            continue
        report = check_types(lowered, original)
        assert report.status == "typed", (report.problems or report.untyped)[0]
        typed += 1
    assert typed
