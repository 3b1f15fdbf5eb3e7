"""Arguments of the doors, refused before any work is done where they cannot be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..errors import InputError
from ..plan.tactics import RewriteTactic, Tactic
from ..verify.levels import policy
from .module import ParallelModule
from .pipeline.options import parse_bytes


def check_model(model: object) -> None:
    """InputError unless ``model`` is an ordinary module with real tensors on one kind of device."""
    if isinstance(model, type):
        raise InputError(
            f"expected an nn.Module, found the class {model.__name__}; make an instance first, or use @hocket.parallel"
        )
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, found {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("expected an ordinary nn.Module, found a TorchScript module; pass the module it was scripted from")
    if isinstance(model, ParallelModule):
        raise InputError("this module is parallel already; pass the one it was made from")
    inner = next((path for path, part in model.named_modules() if isinstance(part, ParallelModule)), "")
    if inner:
        raise InputError(
            f"submodule {inner} is parallel already; pass the model with the module that it was made from in its place"
        )
    _check_devices(model)


def _check_devices(model: nn.Module) -> None:
    tensors = pytree.tree_leaves((list(model.parameters()), list(model.buffers())))
    devices = {tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)}
    if "meta" in devices:
        raise InputError(
            "the model has parameters on the meta device; materialise them first (model.to_empty(device='cpu') and load)"
        )
    if len(devices) > 1:
        raise InputError(
            f"expected all parameters and buffers on one kind of device, found {', '.join(sorted(devices))}; move the model"
        )


def check_examples(args: object, kwargs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_args`` and ``example_kwargs`` as a tuple and a dict; a single tensor is a tuple of one."""
    if isinstance(args, Tensor):
        args = (args,)
    if not isinstance(args, (tuple, list)):
        raise InputError(
            f"example_args must be a tuple of the positional arguments, such as (x,); found {type(args).__name__}"
            + ("; keyword arguments go into example_kwargs" if isinstance(args, Mapping) else "")
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(
            f'example_kwargs must be a dict of keyword arguments, such as {{"mask": mask}}; found {type(kwargs).__name__}'
        )
    return tuple(args), dict(kwargs or {})


def check_tactics(tactics: object) -> Sequence[Tactic | RewriteTactic] | str:
    """InputError unless "auto" or a sequence of tactics."""
    if isinstance(tactics, str):
        if tactics != "auto":
            raise InputError(f'tactics must be "auto" or a list such as [TensorParallel("tp")]; found {tactics!r}')
        return tactics
    if not isinstance(tactics, Sequence):
        raise InputError(f'tactics must be "auto" or a list such as [TensorParallel("tp")]; found {type(tactics).__name__}')
    for tactic in tactics:
        if not isinstance(tactic, Tactic | RewriteTactic):
            raise InputError(f'tactics holds {tactic!r}, which is no tactic; expected such as TensorParallel("tp")')
    return tactics


def check_constraints(constraints: object) -> Mapping[str, Any] | None:
    """InputError unless a mapping from names to placements."""
    if constraints is not None and not isinstance(constraints, Mapping):
        raise InputError(
            f'constraints must be a dict such as {{"layers.*.up.weight": "tp:S(0)"}}; found {type(constraints).__name__}'
        )
    return constraints


def check_memory(limit: object) -> int | None:
    """``memory_limit`` in bytes. InputError unless a positive number or a size such as "8GB"."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float, str))):
        raise InputError(f'memory_limit must be a number of bytes or a size such as "8GB"; found {type(limit).__name__}')
    found = parse_bytes(int(limit) if isinstance(limit, float) else limit)
    if found is not None and found <= 0:
        raise InputError(f"memory_limit must be positive; found {limit!r}")
    return found


def check_level(level: object) -> str | None:
    """InputError unless the name of a level of proof, or None."""
    if level is not None and not isinstance(level, str):
        raise InputError(f'verify must be "off", "types", "float", "ring" or "full"; found {level!r}')
    policy(level)
    return level
