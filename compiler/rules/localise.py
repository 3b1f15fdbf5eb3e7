"""Rewrite the size arguments of an op so that it runs on pieces.

    view(x, [B, S, D])  on a piece  ->  reshape(x_local, [B / p, S, D])

Most ops take their sizes from their tensors and need nothing. The ops below name the size of their (first) output as a constant,
which must become the size of the local output. Strides named beside a size are dropped: a program never depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

aten = torch.ops.aten

Arguments = tuple[Any, ...]
Keywords = dict[str, Any]
Call = tuple[Any, Arguments, Keywords]
"""(target, args, kwargs): ready for ``graph.call_function`` or to be called."""

OUTPUT_SIZE_ARGUMENT: Mapping[Any, tuple[Any, int]] = {
    # target -> (target to call instead, position of the argument that is the whole size of the output)
    aten.view.default: (aten.reshape.default, 1),
    aten._unsafe_view.default: (aten.reshape.default, 1),
    aten.view_copy.default: (aten.reshape.default, 1),
    aten.reshape.default: (aten.reshape.default, 1),
    aten.expand.default: (aten.expand.default, 1),
    aten.expand_copy.default: (aten.expand_copy.default, 1),
    aten.broadcast_to.default: (aten.expand.default, 1),
    aten.new_zeros.default: (aten.new_zeros.default, 1),
    aten.new_ones.default: (aten.new_ones.default, 1),
    aten.new_full.default: (aten.new_full.default, 1),
    aten.new_empty.default: (aten.new_empty.default, 1),
    aten.zeros.default: (aten.zeros.default, 0),
    aten.ones.default: (aten.ones.default, 0),
    aten.full.default: (aten.full.default, 0),
    aten.empty.memory_format: (aten.empty.memory_format, 0),
    aten.slice_backward.default: (aten.slice_backward.default, 1),
    aten.select_backward.default: (aten.select_backward.default, 1),
    aten.diagonal_backward.default: (aten.diagonal_backward.default, 1),
    aten.unfold_backward.default: (aten.unfold_backward.default, 1),
    aten.index_select_backward.default: (aten.index_select_backward.default, 1),
    aten.value_selecting_reduction_backward.default: (aten.value_selecting_reduction_backward.default, 3),
    aten.trace_backward.default: (aten.trace_backward.default, 1),
    aten.upsample_nearest1d_backward.default: (aten.upsample_nearest1d_backward.default, 2),
    aten.upsample_nearest2d_backward.default: (aten.upsample_nearest2d_backward.default, 2),
    aten.upsample_bilinear2d_backward.default: (aten.upsample_bilinear2d_backward.default, 2),
    aten.upsample_bicubic2d_backward.default: (aten.upsample_bicubic2d_backward.default, 2),
}

STRIDED: Mapping[Any, tuple[Any, int]] = {
    # target -> (the same op without strides, position of the size); the stride follows the size
    aten.new_empty_strided.default: (aten.new_empty.default, 1),
    aten.empty_strided.default: (aten.empty.memory_format, 0),
    aten._reshape_alias.default: (aten.reshape.default, 1),
}


def localise(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output_shape: Sequence[Any]) -> Call:
    """The call to make on a piece.

    output_shape: local shape of the op's first output; its entries are ints or ``fx.Node``s that give ints (uneven chunks).
    Ops that name no sizes come back unchanged.
    """
    size = list(output_shape)
    if target in OUTPUT_SIZE_ARGUMENT:
        instead, position = OUTPUT_SIZE_ARGUMENT[target]
        return (instead, *_replaced(target, args, kwargs, {position: size}))
    if target in STRIDED:
        instead, position = STRIDED[target]
        shorter = [*args[:position], size, *args[position + 2 :]]
        kept = {name: value for name, value in kwargs.items() if name not in ("size", "stride")}
        return instead, tuple(shorter), kept
    if target in SPECIAL:
        return (target, *_replaced(target, args, kwargs, SPECIAL[target](size)))
    return target, tuple(args), dict(kwargs)


def names_sizes(target: Any) -> bool:
    """Whether the op has arguments that ``localise`` rewrites."""
    return target in OUTPUT_SIZE_ARGUMENT or target in STRIDED or target in SPECIAL


def _group_norm(size: list[Any]) -> dict[int, Any]:
    # native_group_norm(input, weight, bias, N, C, HxW, group, eps): groups see whole channels, so only N is ever cut
    return {3: size[0]}


def _group_norm_backward(size: list[Any]) -> dict[int, Any]:
    # native_group_norm_backward(grad, input, mean, rstd, weight, N, C, HxW, group, mask)
    return {5: size[0]}


def _embedding_backward(size: list[Any]) -> dict[int, Any]:
    # embedding_dense_backward(grad, indices, num_weights, padding_idx, scale): output is [num_weights, width]
    return {2: size[0]}


SPECIAL: Mapping[Any, Callable[[list[Any]], dict[int, Any]]] = {
    aten.native_group_norm.default: _group_norm,
    aten.native_group_norm_backward.default: _group_norm_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
}


def _replaced(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], changes: Mapping[int, Any]
) -> tuple[Arguments, Keywords]:
    """Arguments with the ones at the given schema positions replaced, whether they were passed by position or by name."""
    names = [argument.name for argument in target._schema.arguments]
    new_args, new_kwargs = list(args), dict(kwargs)
    for position, value in changes.items():
        if position < len(new_args):
            new_args[position] = value
        else:
            new_kwargs[names[position]] = value
    return tuple(new_args), new_kwargs
