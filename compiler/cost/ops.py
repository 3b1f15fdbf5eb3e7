"""Work of one op on local shapes: floating-point operations of the dense kernels, memory traffic of everything else.

    mm, bmm          2 * |out| * k                     convolution            2 * |out| * |weight| / out_channels
    attention        2 * B*H*Sq*Sk * (E + Ev)          attention backward     2.5 x forward (five products instead of two)

Ops that only re-describe memory (views) are free; gathers of rows (embedding, index) read the rows they return, not the whole
table. Sizes may be ints or sympy expressions: the same formulas serve numbers and symbols. A test holds them against torch's
FlopCounter.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten

Size = Any
"""An int or a sympy expression."""

Shape = tuple[Size, ...]


@dataclass(frozen=True)
class LocalTensor:
    """A tensor on one rank: sizes and bytes per element."""

    shape: Shape
    itemsize: int

    @property
    def numel(self) -> Size:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> Size:
        """Bytes of the elements."""
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Work:
    """What one op does on one rank."""

    flops: Size
    bytes_moved: Size
    is_view: bool = False


Tensors = Sequence[LocalTensor]


def _matmul(inputs: Tensors, outputs: Tensors) -> Size:
    return 2 * outputs[0].numel * inputs[-1].shape[-2]


def _attention(inputs: Tensors, _outputs: Tensors) -> Size:
    query, key, value = inputs[:3]
    return 2 * query.numel * key.shape[-2] + 2 * math.prod(query.shape[:-1]) * key.shape[-2] * value.shape[-1]


def _attention_backward(inputs: Tensors, outputs: Tensors) -> Size:
    forward = _attention(inputs[1:4], outputs)  # inputs: gradient, query, key, value, ...
    return 5 * forward // 2 if isinstance(forward, int) else forward * 5 / 2


def _convolution(inputs: Tensors, outputs: Tensors) -> Size:
    return 2 * outputs[0].numel * math.prod(inputs[1].shape[1:])


def _transposed_convolution(inputs: Tensors, _outputs: Tensors) -> Size:
    return 2 * inputs[0].numel * math.prod(inputs[1].shape[1:])


def _convolution_backward(inputs: Tensors, outputs: Tensors) -> Size:
    # inputs: gradient, input, weight; outputs: gradients of input and weight (each as dear as the forward) and bias, or some of
    # them
    products = sum(1 for output in outputs if len(output.shape) == len(inputs[2].shape))
    return 2 * inputs[0].numel * math.prod(inputs[2].shape[1:]) * products


def chain_flops(inputs: Tensors, outputs: Tensors) -> Size:
    """Products of a chain whose steps give out [count, rows, ...]: every row of every step meets every matrix once."""
    steps = next((t.shape for t in reversed(outputs) if len(t.shape) > 2), None)
    if steps is None:
        return 0
    return 2 * steps[0] * steps[1] * sum(t.numel for t in inputs if len(t.shape) == 2 and t.shape[0] != steps[1])


FLOPS: Mapping[Any, Callable[[Tensors, Tensors], Size]] = {
    aten.mm: _matmul,
    aten.addmm: _matmul,
    aten.bmm: _matmul,
    aten.baddbmm: _matmul,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}

MATMULS = frozenset((aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution))
"""Dense products whose last operand (second for a convolution) may be a weight."""

_ROW_READERS = frozenset((aten.embedding, aten.index, aten.index_select, aten.gather, aten.take_along_dim))
_FREE = frozenset((aten._unsafe_view.default, aten.lift_fresh.default, operator.getitem))


@functools.cache
def is_view(target: Any) -> bool:
    """Whether the op costs nothing: it describes the memory of its input anew."""
    return target in _FREE or bool(getattr(target, "is_view", False))


def packet(target: Any) -> Any:
    """``aten.mm`` for ``aten.mm.default``; other targets as they are."""
    return getattr(target, "overloadpacket", target)


def work(target: Any, inputs: Tensors, outputs: Tensors, *, transposed: bool = False) -> Work:
    """Work of ``target`` on local tensors.

    inputs: the tensor arguments in the order of ``program.tensor_inputs``; outputs: the tensor results, absent ones left out;
    transposed: for convolutions, whether it is a transposed one.
    """
    if is_view(target):
        return Work(0, 0, is_view=True)
    kind = packet(target)
    formula = chain_flops if str(kind) in ("hocket.chain", "hocket.resume") else FLOPS.get(kind)
    written = sum(t.nbytes for t in outputs)
    read = sum(t.nbytes for t in inputs)
    if kind in _ROW_READERS:
        return Work(0, 2 * written + sum(t.nbytes for t in inputs[1:]))
    if transposed and kind is aten.convolution:
        formula = _transposed_convolution
    if transposed and kind is aten.convolution_backward:
        inputs = (inputs[1], inputs[0], *inputs[2:])  # its products run over the pixels of the input, not of the output
    return Work(formula(inputs, outputs) if formula else 0, read + written)


_TRANSPOSED_ARGUMENT: Mapping[Any, int] = {aten.convolution: 6, aten.convolution_backward: 7}


def is_transposed(target: Any, args: Sequence[Any]) -> bool:
    """Whether a call is a transposed convolution or its backward."""
    position = _TRANSPOSED_ARGUMENT.get(packet(target))
    return position is not None and bool(args[position])
