"""Convolutional samplers are evaluated by rows of their image, and draw what pixel by pixel draws."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import hocket
from hocket.compiler.capture import capture
from hocket.compiler.decoding.image_layers import find_regions
from hocket.compiler.decoding.regions import RegionNet
from hocket.compiler.decoding.units import UnsliceableError
from hocket.compiler.decoding.window import best_size
from hocket.errors import InputError


class Masked(nn.Module):
    """Two masked 3 x 3 convolutions and a 1 x 1 one (PixelCNN)."""

    def __init__(self, side: tuple[int, int] = (6, 5), kernel: int = 3) -> None:
        super().__init__()
        self.side = side
        self.convs = nn.ModuleList([nn.Conv2d(1, 4, kernel, padding=kernel // 2), nn.Conv2d(4, 4, kernel, padding=kernel // 2)])
        self.out = nn.Conv2d(4, 1, 1)
        mask = torch.ones(kernel, kernel)
        mask[kernel // 2 + 1 :] = 0
        mask[kernel // 2, kernel // 2 + 1 :] = 0
        self.register_buffer("later", mask.clone())
        mask[kernel // 2, kernel // 2] = 0
        self.register_buffer("first", mask)

    def forward(self, x: Tensor) -> Tensor:
        h = x.view(x.shape[0], 1, *self.side)
        for conv, mask in zip(self.convs, (self.first, self.later), strict=True):
            h = torch.tanh(F.conv2d(h, conv.weight * mask, conv.bias, padding=conv.padding))  # type: ignore[arg-type,operator]
        return (3 * self.out(h)).view(x.shape)


class Shifted(nn.Module):
    """Two streams, shifted down and right, gated and joined (PixelCNN++); ``k`` parameters a pixel."""

    def __init__(self, side: tuple[int, int] = (5, 6), k: int = 2) -> None:
        super().__init__()
        self.side, self.k = side, k
        self.above, self.left, self.beside = nn.Conv2d(1, 4, (2, 3)), nn.Conv2d(1, 4, (1, 3)), nn.Conv2d(1, 4, (2, 1))
        self.down, self.right, self.join = nn.Conv2d(8, 8, (2, 3)), nn.Conv2d(8, 8, (2, 2)), nn.Conv2d(8, 8, 1)
        self.out = nn.Conv2d(4, k, 1)

    def forward(self, x: Tensor) -> Tensor:
        image = x.view(x.shape[0], 1, *self.side)
        u = lower(self.above(F.pad(image, (1, 1, 1, 0))))
        ul = lower(self.left(F.pad(image, (1, 1, 0, 0)))) + F.pad(self.beside(F.pad(image, (0, 0, 1, 0))), (1, 0, 0, 0))[..., :-1]
        u = gated(u, self.down(F.pad(both(u), (1, 1, 1, 0))))
        ul = gated(ul, self.right(F.pad(both(ul), (1, 0, 1, 0))) + self.join(both(u)))
        return (2 * self.out(F.elu(ul))).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.k)


def lower(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def both(x: Tensor) -> Tensor:
    return F.elu(torch.cat([x, -x], 1))


def gated(x: Tensor, gates: Tensor) -> Tensor:
    a, b = gates.chunk(2, 1)
    return x + a * torch.sigmoid(b)


def bernoulli(logits: Tensor, noise: Tensor) -> Tensor:
    logits = logits[..., 0] - logits[..., 1] if logits.dim() == 3 else logits
    return (noise < logits).float()


def by_pixel(model: nn.Module, noise: Tensor) -> Tensor:
    x = torch.zeros_like(noise)
    with torch.no_grad():
        for i in range(noise.shape[1]):
            x[:, i] = bernoulli(model(x), noise)[:, i]
    return x


@pytest.mark.parametrize("kind", [Masked, Shifted])
@settings(max_examples=4, deadline=None)
@given(window=st.integers(1, 30), rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_windows_of_any_size_draw_what_pixel_by_pixel_draws(kind: type[nn.Module], window: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, noise = kind().eval(), torch.randn(rows, 30)
    x, report = hocket.sample(model, bernoulli, noise, window=window)
    assert torch.equal(x, by_pixel(model, noise))
    assert report.evaluated == "only what a window can change was computed"


def test_a_window_computes_the_rows_that_it_reaches_and_needs() -> None:
    model = Masked((12, 4)).eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    regions = find_regions(capture(model, (torch.zeros(2, 48),), train=False), tensors, 48)
    assert [regions.reached(5)[n] for n in regions.layers][-1] == 5
    assert max(regions.needed(6).values()) == 6
    assert all(read.high <= 0 for layer in regions.layers.values() for read in layer.reads)  # zero rows of the kernels are left out
    net = RegionNet(regions, 1, torch.float32)
    net.begin(20, 28)
    net.settle(28)
    assert net._done[regions.last] == 7


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: F.conv2d(x, torch.ones(1, 1, 3, 3), padding=1, stride=(1, 1)).flip(2), "flip"),
        (lambda x: F.conv2d(x, torch.ones(1, 1, 3, 3), padding=1), "rows below"),
    ],
)
def test_networks_that_are_not_row_by_row_are_refused(change: object, reason: str) -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return change(x.view(x.shape[0], 1, 4, 5)).view(x.shape)  # type: ignore[operator]

    program = capture(Other(), (torch.zeros(2, 20),), train=False)
    with pytest.raises(UnsliceableError, match=reason):
        find_regions(program, {}, 20)


def test_a_convolution_that_sees_the_pixel_itself_is_refused() -> None:
    model = Masked().eval()
    model.first.fill_(1.0)  # type: ignore[operator,union-attr]
    with pytest.raises(InputError, match="depend on position"):
        hocket.sample(model, bernoulli, torch.randn(1, 30))


def test_another_order_evaluates_the_whole_network() -> None:
    class Backwards(Masked):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(1)).flip(1)

    model, noise = Backwards().eval(), torch.randn(2, 30)
    _, report = hocket.sample(model, bernoulli, noise, order=list(range(29, -1, -1)))
    assert "row by row only" in report.evaluated


def test_the_best_window_is_kept_once_all_were_tried() -> None:
    speed = {64: 5.0, 128: 9.0, 32: 1.0}
    rates: dict[int, list[float]] = {size: [] for size in speed}
    chosen = []
    for _ in range(12):
        size = best_size(list(speed), rates.__getitem__)
        rates[size].append(speed[size] if rates[size] else speed[size] / 2)  # the first call prepares
        chosen.append(size)
    assert chosen[:3] == [64, 128, 32]
    assert chosen[-3:] == [128, 128, 128]
    assert chosen.count(32) == 1  # far behind
