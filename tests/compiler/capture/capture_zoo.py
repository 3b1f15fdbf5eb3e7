"""The corners of PyTorch of the zoo of whole models, and a few that only a capture meets: (module, args, kwargs) each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "zoo"))

from zoo_case import Call, rows
from zoo_case import Dense as Linear
from zoo_corners import CORNERS
from zoo_layers import complex_rotary, gru, lstm

CASES: dict[str, Callable[[], Call]] = {make.__name__: make for make in (*CORNERS, lstm, gru, complex_rotary)}


def case(make: Callable[[], Call]) -> Callable[[], Call]:
    """Add a case that only captures are tried on."""
    CASES[make.__name__] = make
    return make


@case
def transformer_encoder_layer() -> Call:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), (torch.randn(2, 5, 16),), {}


@case
def dense_mixture_of_experts() -> Call:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 4)
            self.weight = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            p = self.gate(x).softmax(-1)
            w, i = p.topk(2)
            mask = torch.zeros_like(p).scatter(-1, i, w)
            return torch.einsum("te,td,edf->tf", mask, x, self.weight)

    return Model(), (torch.randn(16, 8),), {}


@case
def numpy_scalars() -> Call:
    class Model(Linear):
        def forward(self, x):
            return self.linear(x) * float(np.sqrt(2.0))

    return Model(), (rows(),), {}


@case
def attention() -> Call:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Model(), (torch.randn(2, 5, 16),), {}
