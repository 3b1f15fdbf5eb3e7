"""Small modules that use the corners of PyTorch. Each function gives (module, args, kwargs)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
CASES: dict[str, Callable[[], Case]] = {}


def case(make: Callable[[], Case]) -> Callable[[], Case]:
    CASES[make.__name__] = make
    return make


class Linear(nn.Module):
    """One linear layer that subclasses use as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)


def rows() -> torch.Tensor:
    return torch.randn(4, 8)


@case
def kwargs_and_dicts() -> Case:
    class Model(Linear):
        def forward(self, batch, *, scale=1.0, mask=None):
            return {"y": self.linear(batch["x"]) * scale + mask, "n": batch["x"].shape[0]}

    return Model(), ({"x": rows()},), {"scale": 2.0, "mask": rows()}


@dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor


@case
def dataclass_in_and_out() -> Case:
    class Model(Linear):
        def forward(self, pair):
            return Pair(self.linear(pair.first), pair.second + 1)

    return Model(), (Pair(rows(), rows().requires_grad_()),), {}


@case
def model_output() -> Case:
    from transformers.modeling_outputs import BaseModelOutput

    class Model(Linear):
        def forward(self, x):
            return BaseModelOutput(last_hidden_state=self.linear(x))

    return Model(), (rows(),), {}


@case
def in_place_ops_and_a_counter_buffer() -> Case:
    class Model(Linear):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            y = self.linear(x)
            y.relu_()
            self.count.add_(1)
            return y

    return Model(), (rows(),), {}


@case
def in_place_on_views() -> Case:
    class Model(Linear):
        def forward(self, x):
            y = self.linear(x).clone()
            y[:, 2:4] *= 3
            y[0] = 1.0
            z = y.view(2, 16)
            z.add_(1)
            return y, z[0]

    return Model(), (rows(),), {}


@case
def mutated_input() -> Case:
    class Model(Linear):
        def forward(self, x, cache):
            cache[:2].copy_(x[:2].detach())
            return self.linear(x) + cache

    return Model(), (rows(), torch.zeros(4, 8)), {}


@case
def reassigned_buffer() -> Case:
    class Model(Linear):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            self.mean = self.mean * 0.9 + x.mean(0) * 0.1
            return self.linear(x - self.mean)

    return Model(), (rows(),), {}


@case
def control_flow_on_shapes() -> Case:
    class Model(Linear):
        def forward(self, x):
            if x.shape[0] > 2:
                x = self.linear(x)
            for i in range(x.shape[1] // 4):
                x = x + i
            return x

    return Model(), (rows(),), {}


@case
def activation_checkpointing() -> Case:
    class Model(Linear):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return self.out(checkpoint(lambda t: F.gelu(self.linear(t)), x, use_reentrant=False))

    return Model(), (rows().requires_grad_(),), {}


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x > 0) * 2.0


@case
def custom_autograd_function() -> Case:
    class Model(Linear):
        def forward(self, x):
            return Clamp.apply(self.linear(x))

    return Model(), (rows(),), {}


@case
def autocast_bfloat16() -> Case:
    class Model(Linear):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.norm(self.linear(x))

    return Model(), (rows(),), {}


@case
def forward_hook() -> Case:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model, (rows(),), {}


@case
def backward_hook_on_a_tensor() -> Case:
    class Model(Linear):
        def forward(self, x):
            y = self.linear(x)
            if y.requires_grad:
                y.register_hook(lambda gradient: gradient * 3)
            return y.tanh()

    return Model(), (rows(),), {}


@case
def weight_norm() -> Case:
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), (rows(),), {}


@case
def lstm() -> Case:
    return nn.LSTM(8, 8, num_layers=2, batch_first=True), (torch.randn(2, 5, 8),), {}


@case
def gru() -> Case:
    return nn.GRU(8, 8), (torch.randn(5, 2, 8),), {}


@case
def transformer_encoder_layer() -> Case:
    return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), (torch.randn(2, 5, 16),), {}


@case
def dense_mixture_of_experts() -> Case:
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
def complex_rotary() -> Case:
    class Model(Linear):
        def __init__(self):
            super().__init__()
            self.register_buffer("f", torch.polar(torch.ones(5, 4), torch.randn(5, 4)))

        def forward(self, x):
            q = torch.view_as_complex(self.linear(x).float().reshape(2, 5, 4, 2))
            return torch.view_as_real(q * self.f).flatten(2)

    return Model(), (torch.randn(2, 5, 8),), {}


@case
def python_side_effects() -> Case:
    class Model(Linear):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.shapes = []

        def forward(self, x):
            os.environ.get("HOME")
            print("", end="")
            self.calls += 1
            self.shapes.append(x.shape)
            return self.linear(x)

    return Model(), (rows(),), {}


@case
def frozen_parameter() -> Case:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight.requires_grad_(False)
    return model, (rows(),), {}


@case
def unused_parameter() -> Case:
    class Model(Linear):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x)

    return Model(), (rows(),), {}


@case
def numpy_scalars() -> Case:
    class Model(Linear):
        def forward(self, x):
            return self.linear(x) * float(np.sqrt(2.0))

    return Model(), (rows(),), {}


@case
def literal_tensors() -> Case:
    class Model(Linear):
        def __init__(self):
            super().__init__()
            self.scale = torch.randn(8)

        def forward(self, x):
            return self.linear(x) * torch.tensor([1.0, 2.0] * 4) + self.scale

    return Model(), (rows(),), {}


@case
def outputs_that_are_inputs_and_parameters() -> Case:
    class Model(Linear):
        def forward(self, x):
            y = self.linear(x)
            return y, x, self.linear.bias, y, None, "text"

    return Model(), (rows().requires_grad_(),), {}


@case
def attention() -> Case:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return Model(), (torch.randn(2, 5, 16),), {}


@case
def parameter_list_and_plain_list_of_parameters() -> Case:
    class Model(Linear):
        def __init__(self):
            super().__init__()
            self.scales = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(3)])
            self.again = [self.scales[0], self.linear.bias]

        def forward(self, x):
            y = self.linear(x)
            for scale in self.scales:
                y = y * scale
            return y + self.again[0] + self.again[1]

    return Model(), (rows(),), {}


@case
def gradient_inside_the_forward() -> Case:
    class Model(Linear):
        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (force,) = torch.autograd.grad(self.linear(x).square().sum(), x, create_graph=True)
            return force

    return Model(), (rows(),), {}


@case
def shared_block_called_twice() -> Case:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x):
            return self.block(self.block(x))

    return Model(), (rows(),), {}
