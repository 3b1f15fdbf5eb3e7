"""The registry of the zoo: every case by name, and the models that must be refused, with the reason."""

from __future__ import annotations

import torch
from torch import nn
from zoo_case import Call, Case, Dense, Refused, rows
from zoo_corners import CORNERS
from zoo_layers import LAYERS
from zoo_public import PUBLIC, mixtral

SETTINGS: dict[str, dict[str, object]] = {
    "dropout": {"random": True},
    "autocast_bfloat16": {"tolerance": 2e-2},  # bfloat16 keeps 8 bits, and pieces round their own sums
    "batch_norm": {"double": "the gradient of a bias before a batch norm is zero but for rounding"},
    "resnet18": {"double": "batch norm over four small pictures multiplies rounding: 5e-5 in float32"},
    "mlp_mixer": {"double": "a bias before a layer norm over its channels has a gradient of cancelling terms: 3e-5 in float32"},
}
"""What a case needs beyond the defaults of ``Case``."""


class _Branch(Dense):
    def forward(self, x):
        if x.sum() > 0:
            return self.linear(x)
        return self.linear(-x)


class _Item(Dense):
    def forward(self, x):
        return self.linear(x) * x.abs().max().item()


class _Filtered(Dense):
    def forward(self, x):
        kept = x[x > 0]
        return self.linear(x) + kept.sum()


class _LoopedExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        best, where = self.gate(x).softmax(-1).topk(2)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = (where == number).any(-1).nonzero().squeeze(-1)
            y = y.index_add(0, mine, expert(x[mine]))
        return y * best.sum(-1, keepdim=True)


@torch.library.custom_op("zoo::double_it", mutates_args=())
def _double_it(x: torch.Tensor) -> torch.Tensor:
    return x * 2


_double_it.register_fake(torch.empty_like)
_double_it.register_autograd(lambda ctx, gradient: gradient * 2)


class _Foreign(Dense):
    def forward(self, x):
        return _double_it(self.linear(x))


def _on_rows(kind: type[nn.Module], count: int = 4) -> Call:
    return kind(), (rows(count),), {}


def _case(build, **defaults) -> Case:
    return Case(build.__name__, build, **{**defaults, **SETTINGS.get(build.__name__, {})})


CASES: dict[str, Case] = {
    case.name: case for case in (*map(_case, CORNERS), *map(_case, LAYERS), *(_case(build, slow=True) for build in PUBLIC))
}

REFUSED: dict[str, Refused] = {
    refused.name: refused
    for refused in (
        Refused("branch_on_data", lambda: _on_rows(_Branch), "if x.sum() > 0:", "torch.where", "the graph depends on values"),
        Refused("item", lambda: _on_rows(_Item), "x.abs().max().item()", "torch.where", "a Python number depends on values"),
        Refused("boolean_index", lambda: _on_rows(_Filtered), "kept = x[x > 0]", "fixed shape", "a shape depends on values"),
        Refused("foreign_op", lambda: _on_rows(_Foreign), "_double_it(self.linear(x))", "plain torch ops", "no rank knows the op"),
        Refused(
            "mixtral_grouped",
            lambda: mixtral("grouped_mm"),
            "experts_forward(self",
            "batched_mm",
            "transformers' grouped product off CUDA is an op of its own whose shapes depend on values",
            slow=True,
        ),
        Refused("looped_experts", lambda: _on_rows(_LoopedExperts, 16), ".nonzero()", "fixed shape", "a shape depends on values"),
    )
}
