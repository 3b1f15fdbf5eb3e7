"""Trees of the user's arguments and results as flat lists of named leaves; bad ones are refused here."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import CaptureError, InputError
from ..program import Literal
from .lift import ModuleTensors

Leaf = torch.Tensor | Literal


def flatten_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[tuple[str, Leaf]], pytree.TreeSpec]:
    """Named leaves of ``(args, kwargs)``, names as in ``args[0]['x']`` and ``kwargs['mask']``, and the tree.

    Raises InputError where there is no tensor at all.
    """
    tree = (tuple(args), dict(kwargs))
    _register_dataclasses(tree)
    paths, spec = pytree.tree_flatten_with_path(tree)
    leaves = []
    for path, value in paths:
        name = ("args", "kwargs")[path[0].idx] + pytree.keystr(path[1:])  # type: ignore[attr-defined]
        leaves.append((name, value if isinstance(value, torch.Tensor) else Literal(value)))
    if not any(isinstance(leaf, torch.Tensor) for _, leaf in leaves):
        shown = ", ".join(type(leaf.value).__name__ for _, leaf in leaves if isinstance(leaf, Literal))
        raise InputError(
            f"the inputs must hold at least one tensor; found {shown or 'none at all'}; a program is made for given shapes"
        )
    return leaves, spec


def flatten_outputs(result: Any) -> tuple[list[tuple[str, Any]], pytree.TreeSpec]:
    """Named leaves of what the user's function returned, names as in ``out['logits']``, and the tree."""
    _register_dataclasses(result)
    paths, spec = pytree.tree_flatten_with_path(result)
    return [("out" + pytree.keystr(path), value) for path, value in paths], spec


def _register_dataclasses(tree: Any) -> None:
    """Teach pytree the plain dataclasses in a tree, so that their fields become leaves."""
    while True:
        unknown = {type(leaf) for leaf in pytree.tree_leaves(tree) if _is_plain_dataclass(leaf)}
        if not unknown:
            return
        for kind in unknown:
            pytree.register_dataclass(kind)


def _is_plain_dataclass(leaf: object) -> bool:
    return dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and type(leaf) not in pytree.SUPPORTED_NODES


def check_target(target: object) -> None:
    """Raises InputError unless ``target`` is a module instance or a plain callable."""
    if isinstance(target, type):
        raise InputError(f"expected an nn.Module instance or a function; found the class {target.__name__}: call it first")
    if not isinstance(target, nn.Module) and not callable(target):
        raise InputError(f"expected an nn.Module or a function of tensors; found {type(target).__name__}")
    if isinstance(target, torch.jit.ScriptModule):
        raise InputError("expected an ordinary nn.Module; found a TorchScript module: capture the module it was scripted from")


def check_call(target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises InputError where the target's own signature refuses the call. Hooks that change arguments may make it fit."""
    hooks = isinstance(target, nn.Module) and bool(target._forward_pre_hooks)
    try:
        signature = inspect.signature(target.forward if isinstance(target, nn.Module) else target)
    except (TypeError, ValueError):  # a builtin has none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        if not hooks:
            raise InputError(f"these arguments do not fit {type(target).__name__}{signature}: {error}") from None


def check_tensors(tensors: ModuleTensors, leaves: list[tuple[str, Leaf]]) -> None:
    """Raises InputError for tensors that no program can hold: other layouts, subclasses, meta or mixed devices."""
    named = {**tensors.params, **tensors.buffers, **{n: t for n, t in leaves if isinstance(t, torch.Tensor)}}
    devices: dict[torch.device, str] = {}
    for name, tensor in named.items():
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            hint = "; run the plain model once, which gives it a shape" if is_lazy(tensor) else ""
            raise InputError(f"{name}: expected a plain tensor; found the subclass {type(tensor).__name__}{hint}")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise InputError(f"{name}: expected a dense tensor; found layout {tensor.layout}; use tensor.to_dense()")
        if tensor.device.type == "meta":
            raise InputError(
                f"{name} is on the meta device and has no values; materialise it first, e.g. module.to_empty(device='cpu')"
            )
        if tensor.ndim > 0 or tensor.device.type != "cpu":  # scalars on the CPU mix with any device, as in torch
            devices.setdefault(tensor.device, name)
    if len(devices) > 1:
        shown = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise InputError(f"expected all parameters and inputs on one device; found {shown}; move them with .to(device)")


def check_output(name: str, value: Any, source: str) -> None:
    """Raises CaptureError for an output leaf that cannot leave a program."""
    if isinstance(value, torch.Tensor) and value.layout is not torch.strided:
        raise CaptureError(f"output {name} of {source} has layout {value.layout}; return a dense tensor")
