"""Small modules, one kind of layer each: convolutions, norms, recurrence, attention, experts, indexing, transforms, losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from zoo_case import Call, Dense, rows


def convolutions() -> Call:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return model, (torch.randn(4, 3, 10, 10),), {}


def batch_norm() -> Call:
    """In float64: the true gradient of a bias before a batch norm is zero, so in float32 both sides hold nothing but rounding."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).double()
    return model, (torch.randn(4, 3, 8, 8, dtype=torch.float64),), {}


def batch_norm_in_eval() -> Call:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval(), (rows(),), {}


def up_and_down() -> Call:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.ConvTranspose2d(4, 8, 2, stride=2),
        nn.PixelShuffle(2),
        nn.Upsample(scale_factor=2),
    )
    return model, (torch.randn(2, 2, 8, 8),), {}


class _GatedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Conv1d(8, 16, 1)
        self.mix = nn.Conv1d(8, 8, 5, padding=2, groups=8)

    def forward(self, x):
        return F.silu(self.mix(F.glu(self.up(x), dim=1)))


def gated_depthwise_conv() -> Call:
    return _GatedConv(), (torch.randn(2, 8, 12),), {}


def group_and_instance_norm() -> Call:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(4, 8), nn.SiLU(), nn.InstanceNorm2d(8, affine=True))
    return model, (torch.randn(2, 4, 6, 6),), {}


def layer_and_rms_norm() -> Call:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 8)), (torch.randn(2, 6, 8),), {}


def dropout() -> Call:
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Linear(16, 4)), (rows(),), {}


def lstm() -> Call:
    return nn.LSTM(8, 8, num_layers=2, batch_first=True), (torch.randn(4, 5, 8),), {}


def gru() -> Call:
    return nn.GRU(8, 8), (torch.randn(5, 4, 8),), {}


class _Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        h, c = x.new_zeros(x.shape[1], 8), x.new_zeros(x.shape[1], 8)
        made = []
        for step in x:
            h, c = self.cell(step, (h, c))
            made.append(self.out(h))
        return torch.stack(made)


def cell_loop() -> Call:
    return _Cells(), (torch.randn(4, 4, 6),), {}


def encoder_layer() -> Call:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0), (torch.randn(2, 6, 16),), {}


class _DenseExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x):
        p = self.gate(x).softmax(-1)
        best, where = p.topk(2)
        share = torch.zeros_like(p).scatter(-1, where, best)
        return torch.einsum("te,td,edf->tf", share, x, self.weight)


def dense_experts() -> Call:
    return _DenseExperts(), (rows(16),), {}


class _RoutedExperts(nn.Module):
    """Every expert takes its four best tokens, so that all shapes are known."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 8, 16)), nn.Parameter(torch.randn(4, 16, 8))

    def forward(self, x):
        weight, token = self.gate(x).softmax(-1).t().topk(4, dim=-1)
        hidden = torch.bmm(torch.bmm(x[token], self.up).relu(), self.down) * weight.unsqueeze(-1)
        return x.index_add(0, token.flatten(), hidden.flatten(0, 1))


def routed_experts() -> Call:
    return _RoutedExperts(), (rows(16),), {}


class _ComplexRotary(Dense):
    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x):
        pairs = torch.view_as_complex(self.linear(x).unflatten(-1, (4, 2)))
        return torch.view_as_real(pairs * self.turns).flatten(2)


def complex_rotary() -> Call:
    return _ComplexRotary(), (torch.randn(2, 6, 8),), {}


class _Attention(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, mask=None):
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        if self.kind == "by hand":
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            scores = (q @ k.mT / 2).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), float("-inf"))
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.kind == "causal", enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def causal_grouped_attention() -> Call:
    return _Attention("causal"), (torch.randn(2, 6, 16),), {}


def attention_with_a_bool_mask() -> Call:
    return _Attention("mask"), (torch.randn(2, 6, 16), torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()), {}


def attention_with_a_learnt_bias() -> Call:
    return _Attention("mask"), (torch.randn(2, 6, 16), torch.randn(1, 4, 6, 6).requires_grad_()), {}


def attention_by_hand() -> Call:
    return _Attention("by hand"), (torch.randn(2, 6, 16),), {}


class _LinearAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        k = F.elu(k) + 1
        state = torch.cumsum(k.unsqueeze(-1) * v.unsqueeze(-2), dim=1)
        return torch.einsum("bsd,bsde->bse", q, state) / (q.abs() * k.cumsum(-2)).sum(-1, keepdim=True)


def linear_attention_by_cumsum() -> Call:
    return _LinearAttention(), (torch.randn(2, 6, 8),), {}


class _Bags(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode="mean")
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.out = nn.Linear(16, 4)

    def forward(self, tokens):
        return self.out(torch.cat([self.bag(tokens), self.words(tokens).amax(1)], -1))


def embedding_bag() -> Call:
    return _Bags(), (torch.randint(0, 20, (4, 6)),), {}


class _Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.message, self.update = nn.Linear(8, 8), nn.Linear(16, 8)

    def forward(self, x, source, target):
        sums = torch.zeros_like(x).index_add(0, target, self.message(x[source]))
        best = x.scatter_reduce(0, target[:, None].expand(-1, 8), self.message(x[source]), "amax")
        return self.update(torch.cat([sums, best], -1))


def graph_convolution() -> Call:
    return _Graph(), (rows(6), torch.randint(0, 6, (10,)), torch.randint(0, 6, (10,))), {}


class _Spectrum(Dense):
    def forward(self, x):
        return self.linear(torch.fft.fft2(x, dim=(-2, -1)).real)


def fourier_mixing() -> Call:
    return _Spectrum(), (torch.randn(2, 4, 8),), {}


class _Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.both, self.one = nn.Bilinear(8, 8, 4), nn.Linear(8, 4)

    def forward(self, x, y):
        return F.cosine_similarity(self.both(x, y), self.one(x), dim=-1), torch.cdist(x, y)


def bilinear_and_distances() -> Call:
    return _Pairs(), (rows(), rows()), {}


class _Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)

    def forward(self, tokens, targets):
        logits = self.head(self.embed(tokens))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=3, label_smoothing=0.1), logits


def cross_entropy_with_ignored_targets() -> Call:
    return _Loss(), (torch.randint(0, 12, (4, 6)), torch.randint(0, 12, (4, 6))), {}


class _Shuffled(Dense):
    def forward(self, x):
        y = self.linear(x)
        order = y.detach().argsort(dim=0)
        y = y.gather(0, order).roll(1, 0).flip(1)
        y = torch.where(y > 0, y, y.exp() - 1)
        return F.pad(y, (1, 1)).unfold(1, 3, 1).mean(-1), torch.stack([y.logsumexp(0), y.std(0), y.prod(0)])


def sorting_rolling_and_windows() -> Call:
    return _Shuffled(), (rows(),), {}


LAYERS = (
    convolutions,
    batch_norm,
    batch_norm_in_eval,
    up_and_down,
    gated_depthwise_conv,
    group_and_instance_norm,
    layer_and_rms_norm,
    dropout,
    lstm,
    gru,
    cell_loop,
    encoder_layer,
    dense_experts,
    routed_experts,
    complex_rotary,
    causal_grouped_attention,
    attention_with_a_bool_mask,
    attention_with_a_learnt_bias,
    attention_by_hand,
    linear_attention_by_cumsum,
    embedding_bag,
    graph_convolution,
    fourier_mixing,
    bilinear_and_distances,
    cross_entropy_with_ignored_targets,
    sorting_rolling_and_windows,
)
