"""The same op at sizes small enough to try in microseconds.

Two signatures have the same structure when a map of sizes takes one to the other such that

    n == 1  <=>  small(n) == 1       n == m  <=>  small(n) == small(m)       parts | n  <=>  trial parts | small(n)

for all sizes n, m of inputs *and outputs*. A reshape is mapped factor by factor. Constants that are sizes are mapped with them;
where constants are positions (slices, kernels, pads) the sizes they speak of stay as they are. Candidates are tried from small to
true sizes until the op runs and the structure is the same.

Trial parts: a cut in a*b even parts is a cut in a of a cut in b, so a prime is enough for its powers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..layout import local_size
from .chains import is_chain, shorter
from .execute import run_whole
from .pieces import TRIALS, make_values
from .signature import OpSignature, TensorSpec, replace_leaves, spec_of
from .views import RESHAPES, factors

NUMEL_LIMIT = 1 << 18
NUMEL_LIMIT_LAST = 1 << 21
"""Elements of all tensors of a trial; the larger limit for the true sizes."""

SIZE_NAMES = frozenset(
    {
        "size",
        "shape",
        "input_sizes",
        "self_sizes",
        "sizes",
        "normalized_shape",
        "num_weights",
        "input_size",
        "bias_sizes",
        "N",
        "C",
        "num_classes",
        "k",
        "split_size",
        "split_sizes",
        "start",
        "end",
        "length",
        "output_size",
    }
)
"""Arguments whose integers are mapped when they are the size of some dimension."""


@dataclass(frozen=True, eq=False)
class Trial:
    """A small signature, the number of parts to cut it into, and what it computes on sample values."""

    signature: OpSignature
    parts: int

    @cached_property
    def outputs(self) -> tuple[TensorSpec | None, ...]:
        """Sizes and types of what the small op computes."""
        return tuple(spec_of(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in self.runs[0][1])

    @cached_property
    def runs(self) -> list[tuple[list[torch.Tensor], list[Any]]]:
        """(inputs, outputs) for every kind of values that the op accepts."""
        found = []
        for kind in range(TRIALS):
            values = make_values(self.signature, kind)
            try:
                found.append((values, run_whole(self.signature, values)))
            except Exception as problem:  # an op may raise anything on values outside its domain
                if kind == TRIALS - 1 and not found:
                    raise problem
        return found


def trial_parts(parts: int) -> list[int]:
    """Numbers of parts to try a rule for ``parts`` with, best first: the prime of a prime power, else parts itself."""
    prime = next(p for p in range(2, parts + 1) if parts % p == 0)
    power = parts
    while power % prime == 0:
        power //= prime
    return [prime, parts] if power == 1 and prime != parts else [parts]


def shrink(signature: OpSignature, parts: int) -> Trial | str:
    """A trial with the structure of ``signature``, or why there is none (the last error seen)."""
    problem = "its structure is lost at every smaller size and the true one is too large to try"
    for small_parts in trial_parts(parts):
        for small in _candidates(signature, parts, small_parts):
            try:
                trial = Trial(small, small_parts)
                outputs = trial.outputs
            except Exception as error:
                problem = str(error).strip().split("\n")[0] or type(error).__name__
                continue
            if _same_structure(signature, outputs, small, parts, small_parts):
                return trial
    return problem


def _same_structure(
    real: OpSignature, outputs: Sequence[TensorSpec | None], small: OpSignature, parts: int, small_parts: int
) -> bool:
    pairs: list[tuple[int, int]] = []
    if len(outputs) != len(real.outputs):
        return False
    for before, after in zip((*real.tensors, *real.outputs), (*small.tensors, *outputs), strict=True):
        if before is None or after is None:
            if (before is None) != (after is None):
                return False
            continue
        if len(before.shape) != len(after.shape):
            return False
        pairs += zip(before.shape, after.shape, strict=True)
    if any((n <= 1 or m <= 1) and n != m for n, m in pairs) or any((n % parts == 0) != (m % small_parts == 0) for n, m in pairs):
        return False
    one_to_one = len(set(pairs)) == len({n for n, _ in pairs}) == len({m for _, m in pairs})
    return one_to_one or real.target in RESHAPES  # the sizes of a reshape are products: its factors are what is kept apart


def _candidates(signature: OpSignature, parts: int, small_parts: int) -> Iterator[OpSignature]:
    if signature.target in RESHAPES:
        yield from _smaller_reshapes(signature, parts, small_parts)
    if is_chain(signature.target):
        yield from _smaller_chains(signature, parts, small_parts)
        return
    sizes = sorted({n for spec in (*signature.tensors, *signature.outputs) if spec for n in spec.shape if n > 1})
    seen = set()
    for keep in _kept_sizes(signature, sizes):
        if keep in seen:
            continue
        seen.add(keep)
        for first in (2, 3):
            mapping = _assign(sizes, keep, parts, small_parts, first)
            small = _mapped(signature, mapping)
            limit = NUMEL_LIMIT_LAST if len(keep) == len(sizes) else NUMEL_LIMIT
            if sum(spec.numel for spec in small.tensors) <= limit:
                yield small
            if len(keep) == len(sizes):
                break


def _smaller_chains(signature: OpSignature, parts: int, small_parts: int) -> Iterator[OpSignature]:
    """Few steps on few rows. Features keep their number; sizes that differ must still do so."""
    named = signature.arguments
    rows, steps = named["init"][0].shape[:1], named["count"]
    others = {n for spec in (*signature.tensors, *signature.outputs) if spec for n in spec.shape} - {*rows, steps}
    fewer_steps = next((n for n in range(2, 32) if n not in others and _alike(steps, n, parts, small_parts)), steps)
    for n in range(small_parts, 4 * small_parts + 32):
        if rows and n not in {*others, fewer_steps} and _alike(rows[0], n, parts, small_parts):
            yield shorter(signature, fewer_steps, n)
    yield signature


def _kept_sizes(signature: OpSignature, sizes: Sequence[int]) -> Iterator[frozenset[int]]:
    """Sets of sizes to leave as they are, from none to all."""
    tiny = frozenset(n for n in sizes if n <= 8)
    spoken = frozenset(_sizes_spoken_of(signature))
    yield frozenset()
    yield tiny
    yield spoken
    yield tiny | spoken
    for limit in (32, 64, 128, 512):
        kept = frozenset(n for n in sizes if n <= limit)
        yield kept
        yield kept | spoken
    for n in reversed(sizes):
        yield frozenset(sizes) - {n}
    yield frozenset(sizes)


def _sizes_spoken_of(signature: OpSignature) -> Iterator[int]:
    dim = signature.arguments.get("dim")
    if isinstance(dim, int):
        for spec in (*signature.tensors, *signature.outputs):
            if spec is not None and -len(spec.shape) <= dim < len(spec.shape):
                yield spec.shape[dim]


def _assign(sizes: Sequence[int], keep: frozenset[int], parts: int, small_parts: int, first: int) -> dict[int, int]:
    """Small sizes in the same order as the true ones, distinct, with the same divisibility."""
    mapping = {n: n for n in keep}
    last = first * small_parts - 1
    for n in sizes:
        if n in keep:
            continue
        last += 1
        while last in keep or not _alike(n, last, parts, small_parts):
            last += 1
        mapping[n] = last
    return mapping


def _alike(n: int, small: int, parts: int, small_parts: int) -> bool:
    if n % parts == 0:
        return small % small_parts == 0
    return small % small_parts != 0 and local_size(small, small_parts, small_parts - 1) > 0


def _mapped(signature: OpSignature, mapping: dict[int, int]) -> OpSignature:
    def tensor(value: Any) -> Any:
        if isinstance(value, TensorSpec):
            return TensorSpec(tuple(mapping.get(n, n) for n in value.shape), value.dtype)
        return value

    def constant(value: Any) -> Any:
        return mapping.get(value, value) if type(value) is int else tensor(value)

    names = [argument.name for argument in getattr(getattr(signature.target, "_schema", None), "arguments", ())]
    args = []
    for position, value in enumerate(signature.args):
        named = position < len(names) and names[position] in SIZE_NAMES
        args.append(replace_leaves(value, constant if named else tensor))
    kwargs = tuple((name, replace_leaves(value, constant if name in SIZE_NAMES else tensor)) for name, value in signature.kwargs)
    small = OpSignature(signature.target, tuple(args), kwargs, signature.outputs)
    return _with_dependent_constants(small, names)


def _with_dependent_constants(small: OpSignature, names: Sequence[str]) -> OpSignature:
    """Constants that are computed from sizes: spatial products, and positions that must stay inside their dimension."""
    args = list(small.args)
    if "HxW" in names and len(args) > names.index("HxW"):
        args[names.index("HxW")] = math.prod(small.arguments["input"].shape[2:])
    sizes = small.arguments.get("input_sizes")
    table = sizes if isinstance(sizes, tuple) else small.tensors[0].shape if small.tensors else ()
    dim, index = small.arguments.get("dim"), small.arguments.get("index")
    if isinstance(dim, int) and type(index) is int and table and "index" in names and len(args) > names.index("index"):
        args[names.index("index")] = max(-table[dim], min(index, table[dim] - 1))
    return OpSignature(small.target, tuple(args), small.kwargs, small.outputs)


def _smaller_reshapes(signature: OpSignature, parts: int, small_parts: int) -> Iterator[OpSignature]:
    before, output = signature.tensors[0], signature.outputs[0]
    found = None if output is None else factors(before.shape, output.shape)
    if found is None or output is None:
        return
    spans_before, spans_after, atoms = found
    for keep_up_to in (1, 8, 64):
        small: list[int] = []
        for n in atoms:
            mapping = _assign([n], frozenset({n}) if n <= keep_up_to else frozenset(), parts, small_parts, 2 + len(small) % 3)
            small.append(mapping[n])

        def sizes(spans: list[list[int]], small: list[int] = small) -> tuple[int, ...]:
            return tuple(math.prod(small[k] for k in span) for span in spans)

        spec = TensorSpec(sizes(spans_before), before.dtype)
        if spec.numel > NUMEL_LIMIT:
            continue
        rest = signature.args[1:]
        if rest and isinstance(rest[0], tuple) and len(rest[0]) == len(output.shape):
            rest = (sizes(spans_after), *rest[1:])
        elif rest and isinstance(rest[0], tuple) and signature.target not in _KEEPS_ARGUMENTS:
            return
        yield OpSignature(signature.target, (spec, *rest), signature.kwargs, signature.outputs)


_KEEPS_ARGUMENTS = frozenset({torch.ops.aten.squeeze.dims})
