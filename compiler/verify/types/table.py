"""Which type rule belongs to which op. A visible table: nothing registers itself.

Ops that are not here are typed all the same where every operand is whole on every rank, or where torch tags them as element by
element; everything else is reported as untypable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from . import blocks, chains, collectives, contractions, creation, indexing, pointwise, ranges, reductions, views, windows
from .integers import is_integer_function

Rule = Callable[..., Any]

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


def _ops(names: str, rule: Rule, namespace: Any = aten) -> dict[Any, Rule]:
    """op packet -> rule, for the names that this torch has."""
    return {getattr(namespace, name): rule for name in names.split() if hasattr(namespace, name)}


POINTWISE: Mapping[Any, Rule] = {
    **_ops("clone detach alias contiguous lift_fresh_copy lift_fresh copy", pointwise.identity),
    **_ops("_to_copy to", pointwise.cast),
    **_ops("neg negative real imag _conj _conj_physical conj", pointwise.linear),
    **_ops("add sub rsub", pointwise.add),
    **_ops("mul", pointwise.multiply),
    **_ops("div", pointwise.divide),
    **_ops("addcmul", pointwise.addition_with_factor),
    **_ops("addcdiv", pointwise.addition_with_quotient),
    **_ops("lerp", pointwise.lerp),
    **_ops("where", pointwise.where),
    **_ops("masked_fill", pointwise.masked_fill),
    **_ops("maximum", pointwise.extremum("max")),
    **_ops("minimum", pointwise.extremum("min")),
    **_ops(
        "gelu_backward silu_backward threshold_backward tanh_backward sigmoid_backward elu_backward leaky_relu_backward "
        "hardtanh_backward softplus_backward hardswish_backward hardsigmoid_backward native_dropout_backward log_sigmoid_backward "
        "mish_backward logit_backward softshrink_backward hardshrink_backward",
        pointwise.linear_in_first,
    ),
    **_ops("hardtanh elu leaky_relu softplus hardswish selu celu relu6 polar complex clamp_min clamp_max", pointwise.nonlinear),
}

VIEWS: Mapping[Any, Rule] = {
    **_ops("view _unsafe_view reshape view_copy _reshape_alias", views.view),
    **_ops("permute permute_copy", views.permute),
    **_ops("transpose transpose_copy swapaxes", views.transpose),
    **_ops("t t_copy numpy_T", views.transpose_2d),
    **_ops("unsqueeze unsqueeze_copy", views.unsqueeze),
    **_ops("squeeze squeeze_copy", views.squeeze),
    **_ops("expand expand_copy broadcast_to", views.expand),
    **_ops("select select_copy", views.select),
    **_ops("select_backward", views.select_backward),
    **_ops("slice slice_copy", ranges.slice_),
    **_ops("narrow narrow_copy", ranges.narrow),
    **_ops("slice_backward", views.slice_backward),
    **_ops("constant_pad_nd", ranges.pad),
    **_ops("split split_with_sizes unsafe_split unsafe_split_with_sizes split_copy split_with_sizes_copy", views.split),
    **_ops("unbind unbind_copy", views.unbind),
    **_ops("cat concat", views.cat),
    **_ops("stack", views.stack),
    **_ops("slice_scatter select_scatter", views.written),
    **_ops("flip", views.along_dims),
    **_ops("roll", views.roll),
    **_ops("tril triu", views.triangle),
    **_ops("repeat", views.repeat),
    **_ops("diagonal diagonal_copy", views.diagonal),
    **_ops("view_as_complex view_as_complex_copy", views.complex_view),
    **_ops("view_as_real view_as_real_copy", views.real_view),
}

PRODUCTS: Mapping[Any, Rule] = {
    **_ops("mm", contractions.mm),
    **_ops("bmm", contractions.bmm),
    **_ops("mv", contractions.mv),
    **_ops("dot vdot", contractions.dot),
    **_ops("addmm", contractions.addmm),
    **_ops("baddbmm", contractions.baddbmm),
    **_ops("addmv", contractions.addmv),
    **_ops("linear", contractions.linear),
    **_ops("convolution", contractions.convolution),
    **_ops("convolution_backward", contractions.convolution_backward),
}

_PADDED = " ".join(f"{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3))
_NEAREST = " ".join(f"{kind}{n}d" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3))
_INTERPOLATED = "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"

WINDOWS: Mapping[Any, Rule] = {
    **_ops("max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d", windows.pooling),
    **_ops("avg_pool2d avg_pool3d avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d", windows.linear_window),
    **_ops(f"{_PADDED} {_NEAREST}", windows.moving_window),
    **_ops(_INTERPOLATED, windows.linear_window),
    **_ops(
        "max_pool2d_with_indices_backward avg_pool2d_backward _adaptive_avg_pool2d_backward avg_pool3d_backward",
        windows.pooling_backward,
    ),
    **_ops(" ".join(f"{name}_backward" for name in _PADDED.split()), windows.pooling_backward),
    **_ops(" ".join(f"{name}_backward" for name in f"{_NEAREST} {_INTERPOLATED}".split()), windows.interpolation_backward),
}

REDUCTIONS: Mapping[Any, Rule] = {
    **_ops("sum", reductions.total),
    **_ops("mean", reductions.mean),
    **_ops("amax any", reductions.extreme("max")),
    **_ops("amin all", reductions.extreme("min")),
    **_ops("argmax argmin", reductions.needs_whole(1, 2)),
    **_ops("prod", reductions.needs_whole(1, 2)),
    **_ops("logsumexp", reductions.needs_whole(1, 2)),
    **_ops("var std", reductions.needs_whole(1, 3)),
    **_ops("var_mean std_mean", reductions.needs_whole(1, 3)),
    **_ops("linalg_vector_norm", reductions.needs_whole(2, 3)),
    **_ops("max min median mode", reductions.needs_whole(1, 2)),
    **_ops("cumsum", reductions.cumulative),
    **_ops("cumprod logcumsumexp cummax cummin", reductions.needs_whole(1)),
    **_ops("sort argsort", reductions.needs_whole(1, default=-1)),
    **_ops("topk", reductions.topk),
    **_ops("_softmax _log_softmax _safe_softmax", reductions.softmax),
    **_ops("_softmax_backward_data _log_softmax_backward_data", reductions.softmax_backward),
    **_ops("native_layer_norm _fused_rms_norm", reductions.layer_norm),
    **_ops("native_layer_norm_backward _fused_rms_norm_backward", reductions.layer_norm_backward),
    **_ops("native_group_norm", reductions.group_norm),
    **_ops("native_group_norm_backward", reductions.group_norm_backward),
    **_ops("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional", reductions.batch_norm(5)),
    **_ops("_native_batch_norm_legit_no_training", reductions.batch_norm(None)),
    **_ops("native_batch_norm_backward", reductions.batch_norm_backward),
}

LOOKUPS: Mapping[Any, Rule] = {
    **_ops("embedding", indexing.embedding),
    **_ops("embedding_dense_backward", indexing.embedding_backward),
    **_ops("index", indexing.index),
    **_ops("index_put _unsafe_index_put", indexing.index_put),
    **_ops("gather", indexing.gather),
    **_ops("scatter", indexing.scatter),
    **_ops("scatter_add", indexing.scatter_add),
    **_ops("index_add", blocks.index_add),
    **_ops("scatter_reduce", blocks.scatter_reduce),
    **_ops("_embedding_bag _embedding_bag_forward_only", blocks.embedding_bag),
    **_ops("_embedding_bag_backward", blocks.embedding_bag_backward),
    **_ops("_trilinear", blocks.trilinear),
    **_ops("glu", blocks.glu),
    **_ops("glu_backward", blocks.glu_backward),
    **_ops("pixel_shuffle", blocks.pixel_shuffle),
    **_ops("pixel_unshuffle", blocks.pixel_unshuffle),
    **_ops("index_select", indexing.index_select),
    **_ops("nll_loss_forward nll_loss2d_forward", indexing.nll_loss),
    **_ops("nll_loss_backward nll_loss2d_backward", indexing.nll_loss_backward),
    # (query, key, value, dropout, causal, mask, scale) -> (out, logsumexp)
    **_ops("_scaled_dot_product_flash_attention_for_cpu", indexing.attention(5, 4)),
    # (grad, query, key, value, out, logsumexp, dropout, causal, mask, scale)
    **_ops("_scaled_dot_product_flash_attention_for_cpu_backward", indexing.attention_backward(8, 7)),
    # (query, key, value, bias, compute_logsumexp, dropout, causal, scale) and its backward
    # (grad, query, key, value, bias, out, logsumexp, seed, offset, dropout, needed, causal, scale)
    **_ops("_scaled_dot_product_efficient_attention", indexing.attention(3, 6)),
    **_ops("_scaled_dot_product_efficient_attention_backward", indexing.attention_backward(4, 11)),
    # (query, key, value, dropout, causal, debug, scale) and its backward
    # (grad, query, key, value, out, logsumexp, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, scale)
    **_ops("_scaled_dot_product_flash_attention", indexing.attention(None, 4)),
    **_ops("_scaled_dot_product_flash_attention_backward", indexing.attention_backward(None, 11)),
}

CREATION: Mapping[Any, Rule] = {
    **_ops("zeros", creation.filled(0, 0)),
    **_ops("ones", creation.filled(0, 1)),
    **_ops("empty", creation.filled(0, None)),
    **_ops("full", creation.filled(0, None, 1)),
    **_ops("new_zeros", creation.filled(1, 0)),
    **_ops("new_ones", creation.filled(1, 1)),
    **_ops("new_empty", creation.filled(1, None)),
    **_ops("new_full", creation.filled(1, None, 2)),
    **_ops("zeros_like", creation.filled_like(0)),
    **_ops("ones_like", creation.filled_like(1)),
    **_ops("empty_like", creation.filled_like(None)),
    **_ops("full_like", creation.filled_like(None, 1)),
    **_ops("fill", creation.fill),
}

COLLECTIVES: Mapping[Any, Rule] = {
    **_ops("wait_tensor", collectives.wait, c10d),
    **_ops("all_reduce", collectives.all_reduce, c10d),
    **_ops("all_gather_into_tensor", collectives.all_gather, c10d),
    **_ops("reduce_scatter_tensor", collectives.reduce_scatter, c10d),
    **_ops("all_to_all_single", collectives.all_to_all, c10d),
    **_ops("broadcast", collectives.broadcast, c10d),
}

CHAINS: Mapping[Any, Rule] = {chains.CHAIN: chains.chain, chains.RESUME: chains.resume}

RULES: Mapping[Any, Rule] = {
    **POINTWISE,
    **VIEWS,
    **PRODUCTS,
    **WINDOWS,
    **REDUCTIONS,
    **LOOKUPS,
    **CREATION,
    **COLLECTIVES,
    **CHAINS,
}

ALWAYS = frozenset({*CREATION, *COLLECTIVES, aten.div, aten.mul, aten.expand, aten.slice, aten.narrow})
"""Ops whose rule is asked even if every operand is whole: they may cut, mark zeros, or divide by the number of ranks. So are ops
that draw random numbers: each rank would draw its own."""


class Facts(NamedTuple):
    """What the checker asks of a call target. is_asked: its rule is asked even if every operand is whole on every rank."""

    is_integer: bool
    is_asked: bool
    rule: Rule | None


@functools.cache
def facts_of(target: Any) -> Facts:
    """Looked up once per target: hashing an op costs more than many a rule."""
    draws = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    return Facts(is_integer_function(target), draws or getattr(target, "overloadpacket", None) in ALWAYS, rule_of(target))


def rule_of(target: Any) -> Rule | None:
    """The rule of an op, None when there is none."""
    found = RULES.get(getattr(target, "overloadpacket", None))
    if found is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        return pointwise.nonlinear
    return found
