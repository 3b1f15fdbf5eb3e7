"""Random numbers as plain integer arithmetic on (seed, op index, global element index).

    key      = mix(seed + (op + 1) * G)                                    one scalar for each op
    bits[i]  = mix(key + i * G),     i = sum_d iota_d * stride_d           one 64-bit word for each element
    mix      = the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), G = 2^64 / golden ratio

The element index is built from broadcast iotas, so ordinary sharding rules cut it like any other value and a sharded program draws
the numbers of the single-device one. Within an op this *is* splitmix64 (passes BigCrush; period 2^64, equidistributed); two ops are
two starting points on the same cycle, so their streams overlap only if the keys lie closer than the element count: about n/2^63
for n elements a stream. Not for cryptography. Uniform numbers carry 24 bits (53 in float64, 11 in float16, 8 in bfloat16), as
torch's do; normal ones are Box-Muller on 32 + 32 bits, so they reach 6.66 standard deviations.

The numbers differ from torch's own generator for the same seed; their distribution does not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from ..errors import CaptureError

_aten = torch.ops.aten
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_BITS = {torch.float64: 53, torch.float16: 11, torch.bfloat16: 8}


def is_random(func: Any) -> bool:
    """True for an op that draws from a generator."""
    return isinstance(func, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in func.tags


def _shift(z: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift to the right: int64's own shift copies the sign bit."""
    return torch.bitwise_right_shift(z, by) & ((1 << (64 - by)) - 1)


def mix(z: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on an int64 tensor of any shape: a bijection of the 64-bit words."""
    for by, factor in _MIX:
        z = (z ^ _shift(z, by)) * factor
    return z ^ _shift(z, 31)


def element_index(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 tensor of ``shape`` that holds each element's row-major position."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    stride = 1
    for dim in reversed(range(len(shape))):
        iota = torch.arange(shape[dim], dtype=torch.int64, device=device) * stride
        index = index + iota.view([shape[dim]] + [1] * (len(shape) - dim - 1))
        stride *= shape[dim]
    return index


class CounterRandom:
    """Rewrites the random ops of one trace.

    new_seed: called once, at the first random op, for the SEED input (int64 scalar) on a device. drawn: how many ops have drawn so
    far; it plays the part of torch's generator state, so that recomputation under activation checkpointing repeats its numbers.
    """

    def __init__(self, new_seed: Callable[[], torch.Tensor]) -> None:
        self._new_seed = new_seed
        self._seed: torch.Tensor | None = None
        self.drawn = 0

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], source: str) -> Any:
        """The op's result with counter-based numbers. Raises CaptureError where the op cannot be made so."""
        if kwargs.get("generator") is not None:
            raise CaptureError(
                f"{func} draws from a generator of its own (at {source}); a captured program has one seed: leave `generator` out"
            )
        rewrite = _REWRITES.get(func)
        if rewrite is not None:
            bound = _bind(func, args, kwargs)
            return rewrite(self, bound)
        if _draws_nothing(func, args, kwargs):
            return func(*args, **kwargs)
        raise CaptureError(
            f"{func} at {source} draws random numbers in an order that no element index can reproduce on several devices; "
            "draw them outside the model and pass them in"
        )

    @contextlib.contextmanager
    def generator_state(self) -> Iterator[None]:
        """Let ``torch.get_rng_state``/``set_rng_state`` save and restore the op counter for the duration of a trace."""

        def get_state() -> _State:
            return _State(self.drawn)

        def set_state(state: object) -> None:
            if isinstance(state, _State):
                self.drawn = state.drawn

        with contextlib.ExitStack() as stack:
            for module in (torch, torch.random):
                stack.enter_context(mock.patch.object(module, "get_rng_state", get_state))
                stack.enter_context(mock.patch.object(module, "set_rng_state", set_state))
            yield

    def bits(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """A fresh 64-bit word for every element."""
        if self._seed is None:
            self._seed = self._new_seed()
        self.drawn += 1
        step = (self.drawn * _GOLDEN) & ((1 << 64) - 1)
        step -= (step >> 63) << 64
        key = mix(self._seed.to(device) + step)
        return mix(element_index(shape, device) * _GOLDEN + key)

    def uniform(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Uniform on [0, 1)."""
        count = _BITS.get(dtype, 24)
        return _shift(self.bits(shape, device), 64 - count).to(dtype) * 2.0**-count

    def normal(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Standard normal, by Box-Muller."""
        if dtype.is_complex:
            real = torch.float64 if dtype is torch.complex128 else torch.float32
            parts = [self.normal(shape, real, device) * math.sqrt(0.5) for _ in range(2)]
            return torch.complex(*parts)
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        bits = self.bits(shape, device)
        radius = ((_shift(bits, 32) + 1).to(wide) * 2.0**-32).log().mul(-2.0).sqrt()
        angle = (bits & 0xFFFFFFFF).to(wide) * (2.0**-32 * 2.0 * math.pi)
        normal: torch.Tensor = (radius * angle.cos()).to(dtype)
        return normal

    def bernoulli(self, probability: Any, like: torch.Tensor) -> torch.Tensor:
        """Ones with the given probability (a number, or a tensor that broadcasts to ``like``)."""
        wide = torch.float64 if like.dtype is torch.float64 else torch.float32
        drawn: torch.Tensor = self.uniform(like.shape, wide, like.device) < probability
        return drawn.to(like.dtype)

    def integers(self, low: int, high: int, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """Integers in [low, high); the bias of the remainder is below (high - low) / 2^63."""
        return _shift(self.bits(shape, device), 1) % (high - low) + low


class _State:
    """What a traced program knows of a generator: how many ops have drawn."""

    def __init__(self, drawn: int) -> None:
        self.drawn = drawn


def _bind(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    schema = func._schema.arguments
    bound = {argument.name: argument.default_value for argument in schema}
    bound.update({argument.name: value for argument, value in zip(schema, args, strict=False)})
    bound.update(kwargs)
    return bound


def _draws_nothing(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Fused ops with a dropout inside draw nothing when its rate is zero."""
    bound = _bind(func, args, kwargs)
    rates = [bound[name] for name in ("dropout_p", "dropout", "p") if isinstance(bound.get(name), (int, float))]
    return bool(rates) and all(rate == 0 for rate in rates)


def _where(bound: dict[str, Any]) -> tuple[list[int], torch.dtype, torch.device]:
    """Shape, dtype and device of the result of a factory op or of its ``_like`` form."""
    like = bound.get("self")
    if isinstance(like, torch.Tensor):
        return list(like.shape), bound.get("dtype") or like.dtype, bound.get("device") or like.device
    device = bound.get("device")
    default = torch.int64 if "high" in bound else torch.get_default_dtype()
    if not isinstance(bound.get("dtype"), torch.dtype):  # a schema's default is a number, not a dtype
        bound["dtype"] = default
    return list(bound["size"]), bound["dtype"], torch.device("cpu") if device is None else torch.device(device)


def _native_dropout(random: CounterRandom, bound: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    x, rate = bound["input"], bound["p"]
    if bound["train"] is False or rate == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = random.bernoulli(1.0 - rate, x).to(torch.bool)
    return x * mask * (1.0 / (1.0 - rate) if rate < 1 else 0.0), mask


def _rand(random: CounterRandom, bound: dict[str, Any]) -> torch.Tensor:
    return random.uniform(*_where(bound))


def _randn(random: CounterRandom, bound: dict[str, Any]) -> torch.Tensor:
    return random.normal(*_where(bound))


def _randint(random: CounterRandom, bound: dict[str, Any]) -> torch.Tensor:
    shape, dtype, device = _where(bound)
    return random.integers(bound.get("low") or 0, bound["high"], shape, device).to(dtype)


def _bernoulli(random: CounterRandom, bound: dict[str, Any]) -> torch.Tensor:
    probability = bound.get("p")
    return random.bernoulli(bound["self"] if probability is None else probability, bound["self"])


def _normal(random: CounterRandom, bound: dict[str, Any]) -> torch.Tensor:
    mean, std = bound["mean"], bound["std"]
    like = torch.add(mean, std)
    drawn: torch.Tensor = random.normal(like.shape, like.dtype, like.device) * std + mean
    return drawn


def _in_place(
    draw: Callable[[CounterRandom, dict[str, Any]], torch.Tensor],
) -> Callable[[CounterRandom, dict[str, Any]], torch.Tensor]:
    """An op that fills its first argument."""

    def fill(random: CounterRandom, bound: dict[str, Any]) -> torch.Tensor:
        target: torch.Tensor = bound["self"]
        return target.copy_(draw(random, bound))

    return fill


def _exponential(random: CounterRandom, bound: dict[str, Any]) -> torch.Tensor:
    target = bound["self"]
    uniform = random.uniform(target.shape, target.dtype, target.device)
    drawn: torch.Tensor = (1.0 - uniform).log() / -bound["lambd"]
    return drawn


def _rrelu(random: CounterRandom, bound: dict[str, Any]) -> torch.Tensor:
    x, noise, lower, upper = bound["self"], bound["noise"], bound["lower"], bound["upper"]
    if not bound["training"]:
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2)
    slope = random.uniform(x.shape, x.dtype, x.device) * (upper - lower) + lower
    noise.copy_(torch.where(x > 0, 1.0, slope))
    return torch.mul(x, noise)


_REWRITES: dict[Any, Callable[[CounterRandom, dict[str, Any]], Any]] = {
    _aten.native_dropout.default: _native_dropout,
    _aten.rand.default: _rand,
    _aten.rand_like.default: _rand,
    _aten.randn.default: _randn,
    _aten.randn_like.default: _randn,
    _aten.randint.default: _randint,
    _aten.randint.low: _randint,
    _aten.randint_like.default: _randint,
    _aten.randint_like.low_dtype: _randint,
    _aten.bernoulli.default: _bernoulli,
    _aten.bernoulli.p: _bernoulli,
    _aten.bernoulli_.float: _in_place(_bernoulli),
    _aten.bernoulli_.Tensor: _in_place(_bernoulli),
    _aten.normal.Tensor_float: _normal,
    _aten.normal.float_Tensor: _normal,
    _aten.normal.Tensor_Tensor: _normal,
    _aten.normal_.default: _in_place(lambda r, b: r.normal(*_where(b)) * b["std"] + b["mean"]),
    _aten.normal.float_float: lambda r, b: r.normal(*_where(b)) * b["std"] + b["mean"],
    _aten.rrelu_with_noise.default: _rrelu,
    _aten.uniform_.default: _in_place(lambda r, b: r.uniform(*_where(b)) * (b["to"] - b["from"]) + b["from"]),
    _aten.exponential_.default: _in_place(_exponential),
    _aten.random_.to: _in_place(lambda r, b: r.integers(0, b["to"], b["self"].shape, b["self"].device)),
    getattr(_aten.random_, "from"): _in_place(lambda r, b: r.integers(b["from"], b["to"], b["self"].shape, b["self"].device)),
}
