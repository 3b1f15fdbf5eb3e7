"""Apply one op to values: integers and booleans by torch itself, floating point values by the op table."""

from __future__ import annotations

import operator
from typing import Any

import torch

from ...errors import UnsupportedError
from .algebra import Algebra
from .ops.chain import is_chain
from .ops.factories import FACTORIES
from .table import decomposition_map, op_table
from .value import RingTensor, Value, map_ring, ring_leaves

_IRRELEVANT = ("layout", "device", "pin_memory", "memory_format", "non_blocking")
"""Arguments that do not change the value."""

_AS_RESHAPE: dict[Any, Any] = {torch.ops.aten.view.default: torch.ops.aten.reshape.default}
"""A view was traced for the strides that one kernel gave; integers here may have others."""

_KEEPS_KNOWN = 1 << 16
"""Known values are carried along by executing the op on them as well; larger tensors drop it."""


def apply(alg: Algebra, op: Any, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
    """The value of ``op(*args, **kwargs)``.

    Raises UnsupportedError naming the op where it has no meaning over the ring.
    """
    if op is operator.getitem:
        return args[0][args[1]]
    if not isinstance(op, torch._ops.OpOverload):
        return _python(op, args, kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in _IRRELEVANT}
    leaves = ring_leaves(args) + ring_leaves(kwargs)
    if is_chain(op):
        return _meaning(alg, op, args, kwargs)
    if not leaves:
        return _without_floats(alg, op, args, kwargs)
    if any(leaf.known is None for leaf in leaves):
        return _meaning(alg, op, args, kwargs)
    real = _known_result(op, args, kwargs)
    if any(leaf.factor is not None for leaf in leaves) and _is_finite_tensor(real):
        return alg.lift(real, leaves[0].dtype)  # arithmetic on mask values: 0 * finfo.min is 0
    return _attach(alg, _meaning(alg, op, args, kwargs), real)


def _python(op: Any, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
    """Integer arithmetic on sizes, as in ``operator.mul`` or ``layout.local_size``."""
    if any(isinstance(a, (RingTensor, torch.Tensor)) for a in (*args, *kwargs.values())):
        raise UnsupportedError(f"unsupported({getattr(op, '__name__', op)}): not an ATen op, applied to tensors")
    return op(*args, **kwargs)


def _meaning(alg: Algebra, op: torch._ops.OpOverload, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
    meaning = op_table().get(op.overloadpacket)
    if meaning is not None:
        return meaning(alg, *args, **kwargs)
    decomposition = decomposition_map().get(op)
    if decomposition is None:
        raise UnsupportedError(f"unsupported({op}): the op has no exact meaning in the verifier's table")
    from .eager import run_eagerly  # the dispatcher of eager code calls back into this module

    return run_eagerly(alg, decomposition, args, kwargs)


def _without_floats(alg: Algebra, op: torch._ops.OpOverload, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
    """An op on integers and booleans only: torch computes it, unless its result is floating point."""
    if torch.Tag.nondeterministic_seeded in op.tags:
        raise UnsupportedError(f"unsupported({op}): draws hidden random numbers; they must be explicit integer ops on a seed")
    factory = FACTORIES.get(op.overloadpacket)
    if factory is not None:
        return factory(alg, *args, **kwargs)
    result = _AS_RESHAPE.get(op, op)(*args, **kwargs)
    if not _has_floats(result):
        return result
    lifted_args, lifted_kwargs = _lift_integers(alg, args), _lift_integers(alg, kwargs)
    value = _meaning(alg, op, lifted_args, lifted_kwargs)
    return _attach(alg, value, result)


def _has_floats(result: Any) -> bool:
    leaves = result if isinstance(result, (tuple, list)) else [result]
    return any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves)


def _lift_integers(alg: Algebra, value: Value) -> Value:
    if isinstance(value, torch.Tensor) and value.dtype != torch.bool:
        return alg.lift(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_lift_integers(alg, item) for item in value])
    if isinstance(value, dict):
        return {name: _lift_integers(alg, item) for name, item in value.items()}
    return value


def _known_result(op: torch._ops.OpOverload, args: Any, kwargs: Any) -> Any:
    """The real result of an op that no drawn input enters; None where it is too large or float64 has no kernel."""
    if any(leaf.numel() > _KEEPS_KNOWN for leaf in ring_leaves(args)):
        return None
    real_args = map_ring(args, lambda leaf: leaf.known)
    real_kwargs = map_ring(kwargs, lambda leaf: leaf.known)
    if isinstance(real_kwargs.get("dtype"), torch.dtype) and real_kwargs["dtype"].is_floating_point:
        real_kwargs["dtype"] = torch.float64
    try:
        return op(*real_args, **real_kwargs)
    except (RuntimeError, TypeError, IndexError):
        return None


def _is_finite_tensor(real: Any) -> bool:
    return isinstance(real, torch.Tensor) and real.is_floating_point() and not bool(real.isnan().any() or real.isposinf().any())


def _attach(alg: Algebra, value: Value, real: Any) -> Value:
    if isinstance(value, RingTensor):
        if isinstance(real, torch.Tensor) and real.shape == value.shape and value.known is None:
            value = RingTensor(value.data, value.factor, value.loose, value.dtype, real.double())
            return alg.mask_known(value)
        return value
    if isinstance(value, (list, tuple)) and isinstance(real, (list, tuple)):
        return type(value)([_attach(alg, v, r) for v, r in zip(value, real, strict=False)])
    return value
