"""Small modules that use the corners of PyTorch: ways of calling, of holding state, and of taking part in autograd."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo_case import Call, Dense, rows


class _Named(Dense):
    def forward(self, batch, *, scale=1.0, mask=None):
        return {"y": self.linear(batch["x"]) * scale + mask, "rows": batch["x"].shape[0]}


def dict_in_and_keywords() -> Call:
    return _Named(), ({"x": rows()},), {"scale": 2.0, "mask": rows()}


@dataclass
class Pair:
    """Both halves of a call."""

    left: Tensor
    right: Tensor


class _Paired(Dense):
    def forward(self, pair):
        return Pair(self.linear(pair.left), pair.right * 2)


def dataclass_in_and_out() -> Call:
    return _Paired(), (Pair(rows(), rows().requires_grad_()),), {}


class _ModelOutput(Dense):
    def forward(self, x):
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.linear(x))


def model_output() -> Call:
    return _ModelOutput(), (rows(),), {}


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens).tanh())


def tied_weights() -> Call:
    return _Tied(), (torch.randint(0, 12, (4, 6)),), {}


class _Counter(Dense):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        y = self.linear(x)
        y.relu_()
        self.calls.add_(1)
        return y * self.calls


def in_place_and_a_counter() -> Call:
    return _Counter(), (rows(),), {}


class _Views(Dense):
    def forward(self, x):
        y = self.linear(x).clone()
        y[:, 2:4] *= 3
        y[0] = 1.0
        y.view(2, 16).add_(1)
        return y


def in_place_on_views() -> Call:
    return _Views(), (rows(),), {}


class _Cache(Dense):
    def forward(self, x, cache):
        cache[:2].copy_(x[:2].detach())
        return self.linear(x) + cache


def changed_input() -> Call:
    return _Cache(), (rows(), torch.zeros(4, 8)), {}


class _Moving(Dense):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        return self.linear(x - self.mean)


def replaced_buffer() -> Call:
    return _Moving(), (rows(),), {}


class _Shapes(Dense):
    def forward(self, x):
        if x.shape[0] > 2:
            x = self.linear(x)
        for i in range(x.shape[1] // 4):
            x = x.sin() + i
        return x


def control_flow_on_shapes() -> Call:
    return _Shapes(), (rows(),), {}


class _Recomputed(Dense):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        return self.out(checkpoint(lambda t: F.gelu(self.linear(t)), x, use_reentrant=False))


def activation_checkpointing() -> Call:
    return _Recomputed(), (rows().requires_grad_(),), {}


class _Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x > 0) * 2.0


class _Custom(Dense):
    def forward(self, x):
        return _Steep.apply(self.linear(x))


def custom_autograd_function() -> Call:
    return _Custom(), (rows(),), {}


class _Autocast(Dense):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.norm(self.linear(x))


def autocast_bfloat16() -> Call:
    return _Autocast(), (rows(),), {}


def forward_hook() -> Call:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model, (rows(),), {}


class _TensorHook(Dense):
    def forward(self, x):
        y = self.linear(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 3)
        return y.tanh()


def backward_hook() -> Call:
    return _TensorHook(), (rows(),), {}


def weight_norm() -> Call:
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 12)), (rows(),), {}


def spectral_norm() -> Call:
    return torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 12)), (rows(),), {}


class _SideEffects(Dense):
    def __init__(self):
        super().__init__()
        self.calls, self.shapes = 0, []

    def forward(self, x):
        os.environ.get("HOME")
        self.calls += 1
        self.shapes.append(x.shape)
        return self.linear(x) * float(np.sqrt(2.0))


def python_side_effects_and_numpy() -> Call:
    return _SideEffects(), (rows(),), {}


def frozen_parameter() -> Call:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    model[0].weight.requires_grad_(False)
    return model, (rows(),), {}


class _Unused(Dense):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x)


def unused_parameter() -> Call:
    return _Unused(), (rows(),), {}


class _Literals(Dense):
    def __init__(self):
        super().__init__()
        self.scale = torch.randn(8)

    def forward(self, x):
        return self.linear(x) * x.new_tensor([1.0, 2.0] * 4) + self.scale.to(x)


def literal_tensors() -> Call:
    return _Literals(), (rows(),), {}


class _Aliases(Dense):
    def forward(self, x):
        y = self.linear(x)
        return y, x, self.linear.bias, y, None, "text"


def outputs_that_are_inputs_and_parameters() -> Call:
    return _Aliases(), (rows().requires_grad_(),), {}


class _Listed(Dense):
    def __init__(self):
        super().__init__()
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(3)])

    def forward(self, x):
        y = self.linear(x)
        for scale in self.scales:
            y = y * scale
        return y + self.scales[0]


def parameter_list() -> Call:
    return _Listed(), (rows(),), {}


class _Force(Dense):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.linear(x).tanh().sum(), x, create_graph=True)
        return force


def gradient_inside_the_forward() -> Call:
    return _Force(), (rows(),), {}


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, x):
        return self.block(self.block(x))


def one_block_called_twice() -> Call:
    return _Twice(), (rows(),), {}


def uneven_sizes() -> Call:
    return nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.LayerNorm(13), nn.Linear(13, 5)), (rows(5, 7),), {}


CORNERS = (
    dict_in_and_keywords,
    dataclass_in_and_out,
    model_output,
    tied_weights,
    in_place_and_a_counter,
    in_place_on_views,
    changed_input,
    replaced_buffer,
    control_flow_on_shapes,
    activation_checkpointing,
    custom_autograd_function,
    autocast_bfloat16,
    forward_hook,
    backward_hook,
    weight_norm,
    spectral_norm,
    python_side_effects_and_numpy,
    frozen_parameter,
    unused_parameter,
    literal_tensors,
    outputs_that_are_inputs_and_parameters,
    parameter_list,
    gradient_inside_the_forward,
    one_block_called_twice,
    uneven_sizes,
)
