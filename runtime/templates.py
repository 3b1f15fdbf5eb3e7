"""Arguments as JSON: constants of torch, slots, and integers that depend on the rank.

    3, 0.5, true, null, "mean", [..]          themselves
    {"slot": 7}                               the value of a slot
    {"float": "inf"}                          inf, -inf, nan; {"complex": [re, im]}
    {"dtype": "float32"} {"layout": "strided"} {"device": "cuda"} {"memory_format": "channels_last"}
    {"coordinate": "tp"}                      index of the rank on an axis
    {"size": [total, "tp"]}                   length of the rank's chunk of total over the axis; {"offset": ...} its first index
    {"size": [total, parts, index]}           the same for any number of parts and any index
    {"add": [a, b]}                           and sub, mul, mod, floordiv, min, max, padded (``shards.padded_size``)

Totals, parts, indices and operands may themselves be expressions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ProgramError
from .mesh import Mesh
from .shards import local_offset, local_size, padded_size

CHUNKS: dict[str, Callable[[int, int, int], int]] = {"size": local_size, "offset": local_offset}
ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mod": operator.mod,
    "floordiv": operator.floordiv,
    "min": min,
    "max": max,
    "padded": padded_size,
}
_NONZERO_RIGHT = frozenset(("mod", "floordiv", "padded"))
EXPRESSIONS = frozenset(("coordinate", *CHUNKS, *ARITHMETIC))

_TORCH_KINDS: dict[str, type] = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_TORCH_NAMES: dict[str, dict[str, Any]] = {
    kind: {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, cls)}
    for kind, cls in _TORCH_KINDS.items()
}
_DEVICES = frozenset(("cpu", "cuda", "meta", "mps", "xpu"))
_SPECIAL_FLOATS = ("inf", "-inf", "nan")
_COMPLEX_OF = {torch.float64: torch.complex128, torch.float32: torch.complex64, torch.float16: torch.complex32}


@dataclass(frozen=True)
class Site:
    """Where a template is folded: the coordinates of a rank; optionally another device or floating dtype for the whole program."""

    mesh: Mesh
    where: Mapping[str, int]
    device: torch.device | None = None
    floating: torch.dtype | None = None

    @classmethod
    def of(cls, mesh: Mesh, rank: int, device: torch.device | None = None, floating: torch.dtype | None = None) -> Site:
        """The site of one rank of a mesh."""
        return cls(mesh, mesh.coordinate(rank), device, floating)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that stands for ``dtype`` here."""
        if self.floating is None or not (dtype.is_floating_point or dtype.is_complex):
            return dtype
        return _COMPLEX_OF.get(self.floating, torch.complex64) if dtype.is_complex else self.floating


def encode_constant(value: Any) -> Any:
    """The template of a constant argument; TypeError for what no template can say. A device loses its index."""
    match value:
        case None | bool() | str():
            return value
        case torch.device():
            return {"device": value.type}
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        case complex():
            return {"complex": [encode_constant(value.real), encode_constant(value.imag)]}
        case list() | tuple():
            return [encode_constant(item) for item in value]
    for kind, cls in _TORCH_KINDS.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise TypeError(f"a program cannot hold an argument of type {type(value).__name__}: {value!r}")


def slots_in(templates: Iterable[Any]) -> list[int]:
    """The slots that some templates read, in order, repeats kept."""
    found: list[int] = []
    for template in templates:
        kind = type(template)
        if kind is dict:
            if "slot" in template:
                found.append(template["slot"])
        elif kind is list:
            found.extend(slots_in(template))
    return found


def is_rank_dependent(template: Any) -> bool:
    """Whether folding it gives different values on different ranks (expressions only; slots do not count)."""
    if isinstance(template, dict):
        return not EXPRESSIONS.isdisjoint(template)
    return isinstance(template, list) and any(map(is_rank_dependent, template))


def fold(template: Any, site: Site) -> Any:
    """The value of a template without slots. ProgramError when it is malformed."""
    if isinstance(template, list):
        return [fold(item, site) for item in template]
    if not isinstance(template, dict):
        return template
    if len(template) != 1:
        raise ProgramError(f"an argument must have one tag, found {sorted(template)}")
    ((tag, value),) = template.items()
    if tag in EXPRESSIONS:
        return fold_integer(template, site)
    if tag in _TORCH_NAMES and value in _TORCH_NAMES[tag]:
        found = _TORCH_NAMES[tag][value]
        return site.dtype(found) if tag == "dtype" else found
    if tag == "device" and value in _DEVICES:
        return site.device or torch.device(value)
    if tag == "float" and value in _SPECIAL_FLOATS:
        return float(value)
    if tag == "complex" and isinstance(value, list) and len(value) == 2:
        return complex(fold(value[0], site), fold(value[1], site))
    raise ProgramError(f"unknown argument {{{tag!r}: {value!r}}}")


def fold_integer(template: Any, site: Site) -> int:
    """The value of an integer expression on a rank. ProgramError when it is malformed."""
    if isinstance(template, int) and not isinstance(template, bool):
        return template
    if not isinstance(template, dict) or len(template) != 1:
        raise ProgramError(f"expected an integer expression, found {template!r}")
    ((tag, value),) = template.items()
    if tag == "coordinate" and value in site.where:
        return site.where[value]
    if tag in CHUNKS and isinstance(value, list):
        if len(value) == 2 and value[1] in site.where:
            return CHUNKS[tag](fold_integer(value[0], site), site.mesh.axis_size(value[1]), site.where[value[1]])
        if len(value) == 3:
            total, parts, index = (fold_integer(v, site) for v in value)
            if parts > 0:
                return CHUNKS[tag](total, parts, index)
    if tag in ARITHMETIC and isinstance(value, list) and len(value) == 2:
        left, right = (fold_integer(v, site) for v in value)
        if right != 0 or tag not in _NONZERO_RIGHT:
            return ARITHMETIC[tag](left, right)
    raise ProgramError(f"malformed integer expression {{{tag!r}: {value!r}}} on mesh {site.mesh}")
