"""Vision models as plain torch.nn modules, in the manner of their public implementations and at any size."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (arXiv 1512.03385)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.downsample = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += shortcut
        return self.relu(y)


class ResNet18(nn.Module):
    """Four stages of two basic blocks."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        stages = [
            nn.Sequential(BasicBlock(inner, outer, 1 if i == 0 else 2), BasicBlock(outer, outer, 1))
            for i, (inner, outer) in enumerate(itertools.pairwise(sizes))
        ]
        self.layers = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.layers(self.stem(x))), 1))


class DenseLayer(nn.Module):
    """Norm, 1x1, norm, 3x3 on all features so far (arXiv 1608.06993)."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(features), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(features, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(y)))


class DenseNet(nn.Module):
    """Dense blocks with halving transitions in between."""

    def __init__(self, growth: int, blocks: tuple[int, ...], start: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, start, 3, 2, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        features = start
        for number, layers in enumerate(blocks):
            self.blocks.append(nn.ModuleList(DenseLayer(features + i * growth, growth) for i in range(layers)))
            features += layers * growth
            if number + 1 < len(blocks):
                half = features // 2
                self.transitions.append(
                    nn.Sequential(
                        nn.BatchNorm2d(features), nn.ReLU(inplace=True), nn.Conv2d(features, half, 1, bias=False), nn.AvgPool2d(2)
                    )
                )
                features = half
        self.norm, self.head = nn.BatchNorm2d(features), nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = torch.cat(features, 1)
            if number < len(self.transitions):
                x = self.transitions[number](x)
        return self.head(F.adaptive_avg_pool2d(F.relu(self.norm(x), inplace=True), 1).flatten(1))


class MixerBlock(nn.Module):
    """An MLP over tokens, then one over channels (arXiv 2105.01601)."""

    def __init__(self, patches: int, width: int, tokens: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(nn.Linear(patches, tokens), nn.GELU(), nn.Linear(tokens, patches))
        self.over_channels = nn.Sequential(nn.Linear(width, channels), nn.GELU(), nn.Linear(channels, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


class MlpMixer(nn.Module):
    """Patches, mixer blocks, mean, head."""

    def __init__(self, *, size: int, patch: int, width: int, tokens: int, channels: int, depth: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock((size // patch) ** 2, width, tokens, channels) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class DiffusionBlock(nn.Module):
    """A transformer block whose norms are shifted, scaled and gated by the condition (arXiv 2212.09748)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class DiffusionTransformer(nn.Module):
    """Patches of a noisy latent, a time step and a class in; the predicted noise out."""

    positions: Tensor

    def __init__(self, *, size: int, channels: int, width: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.width, self.side = width, size // 2
        self.patch = nn.Conv2d(channels, width, 2, 2)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes, width)
        self.register_buffer("positions", torch.randn(1, self.side**2, width) * 0.02)
        self.blocks = nn.ModuleList(DiffusionBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, 4 * channels)

    def forward(self, x: Tensor, step: Tensor, label: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.positions
        condition = self.time(self.frequencies(step).to(x)) + self.label(label)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, dim=-1)
        x = self.out(self.norm(x) * (1 + scale) + shift)
        x = x.reshape(x.shape[0], self.side, self.side, 2, 2, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(x.shape[0], -1, 2 * self.side, 2 * self.side)

    def frequencies(self, step: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = step[:, None].float() * rates[None]
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
