"""torch's own optimizer code as a graph: the update of one parameter, traced once for each distinct form of parameter.

``torch.optim`` optimizers treat parameters independently (the loop of ``_single_tensor_*``), so one trace of ``step()`` on a single
parameter serves every parameter of the same group, shape and dtype. While it is traced, numbers that the code reads out of tensors
(``step.item()``, a learning rate) stay 0-d tensors, in float64 as the Python floats they replace, so they can change between steps.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from ..errors import InputError, UnsupportedError
from ..program import Role, RoleKind
from .flatten import Flat, flatten
from .lift import tensors_of
from .trace import Raw

_PLAIN = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Update:
    """The update of one form of parameter: inputs ``param``, ``grad``, ``lr`` and the states by key; UPDATE outputs."""

    flat: Flat
    states: dict[str, torch.Tensor]


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raises InputError or UnsupportedError unless the optimizer is one of torch.optim over parameters of the model."""
    if not isinstance(optimizer, Optimizer):
        raise InputError(f"expected a torch.optim optimizer; found {type(optimizer).__name__}")
    if not type(optimizer).__module__.startswith("torch.optim") or isinstance(
        optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)
    ):
        raise UnsupportedError(
            f"{type(optimizer).__name__} cannot be captured: only those of torch.optim that update each parameter by itself can; "
            "capture the model without the optimizer and step it outside"
        )
    known = {id(parameter) for parameter in model.parameters()}
    strangers = sum(id(parameter) not in known for group in optimizer.param_groups for parameter in group["params"])
    if strangers:
        raise InputError(f"the optimizer holds {strangers} parameters that are not in the model; build it from model.parameters()")


def grouped(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, torch.Tensor, int]]:
    """(qualified name, parameter, index of its group) for every parameter of the optimizer."""
    names = {id(tensor): name for name, tensor in tensors_of(model).params.items()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            yield names[id(parameter)], parameter, index


def initial_state(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Values of the STATE inputs of ``capture_step(model, optimizer, ...)``: what the optimizer holds now, or would start from.

    Names are ``exp_avg:layers.0.weight``; ``lr:0`` is the learning rate of group 0 (float64 scalar): give it a new value when a
    scheduler changes it. Tensors already in ``optimizer.state`` are returned themselves, not copied.
    Raises UnsupportedError for a state that the optimizer only makes from its first gradient, where zero would not do.
    """
    check_optimizer(model, optimizer)
    mode = FakeTensorMode()
    known: dict[Any, dict[str, torch.Tensor]] = {}
    state = {f"lr:{i}": torch.tensor(float(g["lr"]), dtype=torch.float64) for i, g in enumerate(optimizer.param_groups)}
    for name, parameter, index in grouped(model, optimizer):
        if not parameter.requires_grad:
            continue
        form = (index, parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
        if form not in known:
            known[form] = _state_after_a_step(optimizer, index, _fake(parameter, mode), _fake(parameter, mode), mode)
        now = optimizer.state[parameter] if optimizer.state.get(parameter) else _started(optimizer, index, parameter)
        for key, fake in known[form].items():
            value = now.get(key)
            if value is None:
                _check_zero_start(optimizer, index, key)
                value = torch.zeros_like(parameter, dtype=fake.dtype)
            state[f"{key}:{name}"] = value.detach()
    return state


def trace_update(optimizer: Optimizer, index: int, parameter: torch.Tensor, gradient: torch.Tensor) -> Update:
    """The update of a parameter of group ``index``; ``parameter`` and ``gradient`` are fake tensors and only tell the form."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    states = _state_after_a_step(optimizer, index, _fake(parameter, mode), _fake(gradient, mode), mode)
    roles = [Role(RoleKind.PARAM, "param"), Role(RoleKind.INPUT, "grad"), Role(RoleKind.STATE, "lr")]
    roles += [Role(RoleKind.STATE, key) for key in states]
    with mode:
        lr = torch.empty((), dtype=torch.float64)

    def update(param: torch.Tensor, grad: torch.Tensor, lr: torch.Tensor, *values: torch.Tensor) -> list[torch.Tensor]:
        _one_step(optimizer, index, param, grad, dict(zip(states, values, strict=True)), lr)
        return []

    values = [_fake(parameter, mode), _fake(gradient, mode), lr, *states.values()]
    with mode:
        graph = make_fx(lambda *flat: update(*flat), _allow_non_fake_inputs=True)(*values)
    placeholders = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    raw = Raw(graph, dict(zip(placeholders, roles, strict=True)), [], None, [])
    return Update(flatten(raw, mode), states)


def _fake(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _state_after_a_step(
    optimizer: Optimizer, index: int, param: torch.Tensor, grad: torch.Tensor, mode: FakeTensorMode
) -> dict[str, torch.Tensor]:
    """The optimizer's state of a parameter once it has stepped, as fake tensors."""
    with mode:
        made = _one_step(optimizer, index, param, grad, {}, torch.empty((), dtype=torch.float64))
        states = {key: _fake(value, mode) for key, value in made.items() if isinstance(value, torch.Tensor)}
    odd = [key for key, value in made.items() if not isinstance(value, torch.Tensor) and value is not None]
    if odd:
        raise UnsupportedError(
            f"{type(optimizer).__name__} keeps {odd[0]!r} as a {type(made[odd[0]]).__name__}, which a program would freeze"
        )
    return states


def _one_step(
    optimizer: Optimizer, index: int, param: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], lr: torch.Tensor
) -> dict[str, Any]:
    """Run the optimizer's own ``step`` on a single parameter with a given state; returns the state after it."""
    stepper = _single(optimizer, index, param, lr)
    param.grad = grad
    if state:
        stepper.state[param] = state
    try:
        with _ScalarsStayTensors(), torch.no_grad():
            stepper.step()
    except DataDependentOutputException:
        raise UnsupportedError(
            f"{type(optimizer).__name__} takes decisions by the values of its state, which a program cannot; use "
            "hocket.parallelize and step the optimizer yourself"
        ) from None
    return dict(stepper.state[param])


def _single(optimizer: Optimizer, index: int, param: torch.Tensor, lr: Any) -> Optimizer:
    """The optimizer with one parameter and plain settings; shares nothing that a step changes."""
    stepper = copy.copy(optimizer)
    group = optimizer.param_groups[index]
    stepper.param_groups = [{**group, **{k: v for k, v in _PLAIN.items() if k in group}, "params": [param], "lr": lr}]
    stepper.state = defaultdict(dict)
    return stepper


def _started(optimizer: Optimizer, index: int, parameter: torch.Tensor) -> dict[str, Any]:
    """The state that the optimizer's own ``_init_group`` gives a parameter before its first step."""
    twin = parameter.detach()
    twin.grad = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    stepper = _single(optimizer, index, twin, optimizer.param_groups[index]["lr"])
    start: Callable[..., Any] = getattr(stepper, "_init_group")  # noqa: B009 - not declared by the base class
    start(stepper.param_groups[0], *([] for _ in list(inspect.signature(start).parameters)[1:]))
    return dict(stepper.state[twin])


def _check_zero_start(optimizer: Optimizer, index: int, key: str) -> None:
    """SGD's momentum starts as a copy of the first gradient, which equals a start from zero unless it is dampened."""
    group = optimizer.param_groups[index]
    if key == "momentum_buffer" and group.get("dampening", 0) == 0:
        return
    raise UnsupportedError(
        f"{type(optimizer).__name__} makes {key!r} from its first gradient, which no start value reproduces"
        f"{' with dampening' if group.get('dampening') else ''}; run one ordinary optimizer step first"
    )


class _ScalarsStayTensors(TorchFunctionMode):
    """``t.item()`` gives a 0-d float64 tensor, and ``alpha=``/``value=`` may be one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.item:
            return args[0].to(torch.float64)
        name = getattr(func, "__name__", "")
        factor = kwargs.get("alpha", kwargs.get("value"))
        if isinstance(factor, torch.Tensor) and name.rstrip("_") in ("add", "sub", "addcmul", "addcdiv"):
            return _with_factor(name, args, factor)
        return func(*args, **kwargs)


def _with_factor(name: str, args: tuple[torch.Tensor, ...], factor: torch.Tensor) -> torch.Tensor:
    """``base + factor * term`` in at least float32, as the fused op computes it: kernels that round a product and a sum at once
    do so in ``addcmul`` as they do in ``add`` with a factor."""
    base, terms = args[0], args[1:]
    wide = torch.float32 if base.dtype in _HALF else base.dtype
    kind = name.rstrip("_")
    scale = factor.to(wide.to_real() if wide.is_complex else wide)
    if kind == "addcdiv":
        result = base.to(wide) + terms[0].to(wide) * scale / terms[1].to(wide)
    elif kind == "addcmul":
        result = torch.addcmul(base.to(wide), terms[0].to(wide) * scale, terms[1].to(wide))
    else:
        result = torch.addcmul(base.to(wide), terms[0].to(wide), (-scale if kind == "sub" else scale).to(wide))
    result = result.to(base.dtype)
    return base.copy_(result) if name.endswith("_") else result
