"""Run one op on real CPU tensors in double precision, as the judge of rules.

Attention kernels that exist only for CUDA are judged by the CPU kernel of the same mathematics. Some native kernels do not check
their sizes or indices and would read foreign memory when a wrong rule is tried on them; they are checked here first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..program import tensor_leaves
from .pieces import wide
from .signature import OpSignature, replace_leaves

aten = torch.ops.aten

UNDEFINED_VALUES = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_like.default,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.empty_permuted.default,
    }
)
"""Ops whose values mean nothing: only sizes are compared."""


def run(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Flat outputs of the call on the CPU, float types widened. Raises whatever the op raises."""
    call = TWINS.get(target, target)
    check = GUARDS.get(target)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        new_args = [replace_leaves(value, _on_cpu, list) for value in args]
        new_kwargs = {name: replace_leaves(value, _on_cpu, list) for name, value in kwargs.items()}
        if check is not None:
            check(_by_name(target, new_args, new_kwargs))
        return tensor_leaves(call(*new_args, **new_kwargs))


def run_whole(signature: OpSignature, values: Sequence[torch.Tensor]) -> list[Any]:
    """The op of a signature on whole values."""
    args, kwargs = signature.call(iter(values))
    return run(signature.target, args, kwargs)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return wide(value) if isinstance(value, torch.dtype) else value


def _by_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    named = {argument.name: argument.default_value for argument in target._schema.arguments}
    named.update(zip(named, args, strict=False))
    named.update(kwargs)
    return named


class WrongPieces(Exception):
    """A kernel that checks nothing was given pieces that do not fit together."""


def _require(condition: bool, what: str) -> None:  # noqa: FBT001 - reads as a sentence
    if not condition:
        raise WrongPieces(what)


def _attention(named: Mapping[str, Any]) -> None:
    query, key, value = named["query"], named["key"], named["value"]
    batch, heads, queries, width = query.shape
    _require(key.shape[0] == batch and value.shape[0] == batch, "batch sizes differ")
    _require(key.shape[1] == value.shape[1] and key.shape[1] > 0 and heads % key.shape[1] == 0, "head counts differ")
    _require(key.shape[2] == value.shape[2] and key.shape[3] == width and value.shape[3] == width, "key and value sizes differ")
    mask = named.get("attn_mask", named.get("attn_bias"))
    if mask is not None:
        whole = (batch, heads, queries, key.shape[2])
        _require(all(n in (1, m) for n, m in zip(reversed(mask.shape), reversed(whole), strict=False)), "the mask does not fit")
    gradient = named.get("grad_out", named.get("grad_out_"))
    if gradient is not None:
        _require(gradient.shape == named["out"].shape == query.shape, "output sizes differ")
        _require(named["logsumexp"].shape == query.shape[:3], "logsumexp sizes differ")


def _embedding_backward(named: Mapping[str, Any]) -> None:
    indices = named["indices"]
    _require(named["grad_output"].shape[:-1] == indices.shape, "gradient and index sizes differ")
    _require(indices.numel() == 0 or int(indices.max()) < named["num_weights"], "an index is out of range")


def _pool_backward(named: Mapping[str, Any]) -> None:
    image, indices, gradient = named["self"], named["indices"], named["grad_output"]
    _require(indices.shape == gradient.shape and image.shape[:-2] == gradient.shape[:-2], "sizes differ")
    _require(int(indices.max()) < image.shape[-1] * image.shape[-2], "an index is out of range")


GUARDS: Mapping[Any, Callable[[Mapping[str, Any]], None]] = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention,
    aten._scaled_dot_product_flash_attention.default: _attention,
    aten._scaled_dot_product_flash_attention_backward.default: _attention,
    aten._scaled_dot_product_efficient_attention.default: _attention,
    aten._scaled_dot_product_efficient_attention_backward.default: _attention,
    aten._scaled_dot_product_cudnn_attention.default: _attention,
    aten._scaled_dot_product_cudnn_attention_backward.default: _attention,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.max_pool2d_with_indices_backward.default: _pool_backward,
}


def _attention_forward(named: Mapping[str, Any], mask: Any) -> tuple[Any, Any]:
    _require(named["dropout_p"] == 0.0, "dropout draws random numbers")
    query, key, value = named["query"], named["key"], named["value"]
    kernel = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(query, key, value, 0.0, named["is_causal"], attn_mask=mask, scale=named["scale"])
    return out, lse


def _flash(*args: Any, **kwargs: Any) -> Any:
    named = _by_name(aten._scaled_dot_product_flash_attention.default, args, kwargs)
    out, lse = _attention_forward(named, None)
    seed = torch.zeros(2, dtype=torch.uint64)
    longest = (named["query"].shape[2], named["key"].shape[2])
    return out, lse, None, None, *longest, seed, torch.zeros((), dtype=torch.uint64), out.new_empty(0)


def _efficient(*args: Any, **kwargs: Any) -> Any:
    named = _by_name(aten._scaled_dot_product_efficient_attention.default, args, kwargs)
    out, lse = _attention_forward(named, named["attn_bias"])
    return out, lse, torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)


def _cudnn(*args: Any, **kwargs: Any) -> Any:
    named = _by_name(aten._scaled_dot_product_cudnn_attention.default, args, kwargs)
    out, lse = _attention_forward(named, named["attn_bias"])
    seed = torch.zeros((), dtype=torch.int64)
    longest = (named["query"].shape[2], named["key"].shape[2])
    return out, lse.unsqueeze(-1), None, None, *longest, seed, seed, out.new_empty(0)


def _backward_of(named: Mapping[str, Any]) -> list[Any]:
    gradient = named.get("grad_out", named.get("grad_out_"))
    _require(named["dropout_p"] == 0.0, "dropout draws random numbers")
    mask = named.get("attn_bias")
    return list(
        aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient,
            *(named[name] for name in ("query", "key", "value", "out", "logsumexp")),
            0.0,
            named["is_causal"],
            attn_mask=mask,
            scale=named["scale"],
        )
    )


def _flash_backward(*args: Any, **kwargs: Any) -> Any:
    return _backward_of(_by_name(aten._scaled_dot_product_flash_attention_backward.default, args, kwargs))


def _cudnn_backward(*args: Any, **kwargs: Any) -> Any:
    return _backward_of(_by_name(aten._scaled_dot_product_cudnn_attention_backward.default, args, kwargs))


def _efficient_backward(*args: Any, **kwargs: Any) -> Any:
    named = _by_name(aten._scaled_dot_product_efficient_attention_backward.default, args, kwargs)
    _require(not named["grad_input_mask"][3], "the gradient of the bias has no CPU twin")
    return [*_backward_of(named), None]


TWINS: Mapping[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    aten._scaled_dot_product_cudnn_attention.default: _cudnn,
    aten._scaled_dot_product_cudnn_attention_backward.default: _cudnn_backward,
}
