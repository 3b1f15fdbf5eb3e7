"""Run a program in a wider floating type: every float tensor is cast, and every cast that the program itself makes is rewritten.

Mixed precision disappears: under autocast the bfloat16 casts become casts to the wide type, so that what remains is the function
the program computes, without its rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedError

aten = torch.ops.aten

WIDER_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}

HALF_TO_FLOAT = (aten._softmax.default, aten._log_softmax.default)
"""Ops whose third argument converts half to float on the fly; false once everything is wide."""


def widen_tensor(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A float tensor in ``dtype``, a complex one in its complex counterpart, any other unchanged."""
    return value if dtype is None else value.to(widen_dtype(value.dtype, dtype))


def widen_dtype(found: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What a dtype of the program becomes."""
    if found.is_complex:
        return WIDER_COMPLEX[dtype]
    return dtype if found.is_floating_point else found


def widen_call(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype | None
) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """The call with its dtype arguments widened. UnsupportedError for an op that looks at the bits of a float."""
    if dtype is None:
        return target, args, kwargs
    if target is aten.view.dtype:
        raise UnsupportedError("view.dtype reinterprets the bits of a float, so it has no meaning in another floating type")
    new_args, new_kwargs = _widen(args, dtype), _widen(kwargs, dtype)
    if target in HALF_TO_FLOAT:
        new_args = (*new_args[:2], False)
    return target, new_args, new_kwargs


def _widen(argument: Any, dtype: torch.dtype) -> Any:
    if isinstance(argument, torch.dtype):
        return widen_dtype(argument, dtype)
    if isinstance(argument, (list, tuple)):
        return tuple(_widen(item, dtype) for item in argument)
    if isinstance(argument, Mapping):
        return {key: _widen(item, dtype) for key, item in argument.items()}
    return argument
