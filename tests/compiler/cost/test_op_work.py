"""Work of ops against torch's own FlopCounter, and what is free."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hocket.compiler.cost.ops import LocalTensor, is_transposed, is_view, work

aten = torch.ops.aten


class Counter(TorchDispatchMode):
    """Adds up ``work`` of everything that is dispatched."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        inputs = [LocalTensor(tuple(t.shape), t.itemsize) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [LocalTensor(tuple(t.shape), t.itemsize) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.flops += work(function, inputs, outputs, transposed=is_transposed(function, args)).flops
        return out


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


CASES = {
    "mm": lambda: leaf(3, 5) @ leaf(5, 7),
    "linear with bias": lambda: F.linear(leaf(4, 3, 5), leaf(7, 5), leaf(7)),
    "bmm": lambda: torch.bmm(leaf(2, 3, 5), leaf(2, 5, 7)),
    "baddbmm": lambda: torch.baddbmm(leaf(2, 3, 7), leaf(2, 3, 5), leaf(2, 5, 7)),
    "convolution": lambda: F.conv2d(leaf(2, 3, 9, 8), leaf(4, 3, 3, 3), leaf(4), stride=2, padding=1),
    "transposed convolution": lambda: F.conv_transpose2d(leaf(2, 4, 5, 6), leaf(4, 3, 3, 3), leaf(3), stride=2),
    "convolution without input gradient": lambda: F.conv1d(torch.randn(2, 3, 9), leaf(4, 3, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_flops_of_forward_and_backward_are_those_of_torch(name):
    with FlopCounterMode(display=False) as reference:
        CASES[name]().sum().backward()
    with Counter() as found:
        CASES[name]().sum().backward()
    assert found.flops == reference.get_total_flops() > 0


def test_each_group_of_a_convolution_sees_its_own_channels():
    with Counter() as whole:
        F.conv2d(leaf(2, 6, 9, 8), leaf(4, 6, 3, 3)).sum().backward()
    with Counter() as grouped:
        F.conv2d(leaf(2, 6, 9, 8), leaf(4, 3, 3, 3), groups=2).sum().backward()
    assert whole.flops == 2 * grouped.flops


def test_flops_of_attention_are_those_of_its_products():
    q, k, v = leaf(2, 4, 6, 8), leaf(2, 4, 10, 8), leaf(2, 4, 10, 8)
    with Counter() as found:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    forward = 2 * (2 * 2 * 4 * 6 * 10 * 8)
    assert found.flops == forward + forward * 5 // 2


def test_views_are_free_and_lookups_read_rows():
    x = LocalTensor((1000, 8), 4)
    assert all(
        is_view(o) for o in (aten.view.default, aten.t.default, aten.expand.default, aten._unsafe_view.default, operator.getitem)
    )
    assert not is_view(aten.clone.default)
    assert work(aten.t.default, (x,), (x,)).bytes_moved == 0
    rows = work(aten.embedding.default, (x, LocalTensor((5,), 8)), (LocalTensor((5, 8), 4),))
    assert rows.bytes_moved == 2 * 5 * 8 * 4 + 5 * 8
    assert work(aten.relu.default, (x,), (x,)).bytes_moved == 2 * 1000 * 8 * 4
