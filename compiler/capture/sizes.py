"""Names for the sizes of the inputs: ``B`` for dimension 0, ``S`` for dimension 1, then letters; equal leading sizes share one."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from ..errors import InputError

_LETTERS = [letter for letter in string.ascii_uppercase if letter not in "BS"]


def name_sizes(shapes: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[str | None]] | None = None) -> dict[str, int]:
    """Name -> size for the dimensions of the INPUT leaves.

    shapes: input name -> sizes. given: names the user chose, ``{"args[0]": ("B", "S")}`` (None leaves a dimension unnamed). Equal
    sizes of the same dimension share a name. Raises InputError for unknown inputs or a name with two sizes.
    """
    given = given or {}
    sizes: dict[str, int] = {}
    for name, chosen in given.items():
        if name not in shapes:
            raise InputError(f"sizes names the input {name!r}; the inputs are {', '.join(shapes)}")
        if len(chosen) != len(shapes[name]):
            raise InputError(f"sizes[{name!r}] names {len(chosen)} dimensions; {name} has {len(shapes[name])}")
        for label, size in zip(chosen, shapes[name], strict=True):
            if label is not None and sizes.setdefault(label, size) != size:
                raise InputError(f"size {label!r} is {sizes[label]} in one input and {size} in {name}; use two names")
    free = [letter for letter in _LETTERS if letter not in sizes]
    known: dict[tuple[int, int], str] = {}
    for name, shape in shapes.items():
        if name in given:
            continue
        for dim, size in enumerate(shape):
            if (dim, size) in known:
                continue
            label = _label(dim, size, sizes, free)
            sizes[label] = size
            known[dim, size] = label
    return sizes


def _label(dim: int, size: int, sizes: Mapping[str, int], free: list[str]) -> str:
    preferred = "BS"[dim] if dim < 2 else ""
    if preferred and sizes.get(preferred, size) == size:
        return preferred
    return free.pop(0) if free else f"N{len(sizes)}"
