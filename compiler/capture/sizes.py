"""Names for the sizes of the inputs: ``B`` for dimension 0, ``S`` for dimension 1, then letters; equal leading sizes share one."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from ..errors import InputError

_LETTERS = [letter for letter in string.ascii_uppercase if letter not in "BS"]


Labels = Mapping[str, Sequence[str | None]]
"""Input name -> one label per dimension, None for a dimension without a name."""


def name_sizes(shapes: Mapping[str, Sequence[int]], given: Labels | None = None) -> dict[str, int]:
    """Label -> size, for the labels of ``label_dimensions``."""
    labels = label_dimensions(shapes, given)
    return {label: size for name in shapes for label, size in zip(labels[name], shapes[name], strict=True) if label is not None}


def label_dimensions(shapes: Mapping[str, Sequence[int]], given: Labels | None = None) -> dict[str, tuple[str | None, ...]]:
    """A label for every dimension of the INPUT leaves.

    shapes: input name -> sizes. given: labels the user chose, ``{"args[0]": ("B", "S")}`` (None leaves a dimension unnamed). Equal
    sizes of the same dimension share a label. Raises InputError for unknown inputs or a label with two sizes.
    """
    sizes: dict[str, int] = {}
    labels: dict[str, tuple[str | None, ...]] = {}
    for name, chosen in (given or {}).items():
        if name not in shapes:
            raise InputError(f"sizes names the input {name!r}; the inputs are {', '.join(shapes)}")
        if len(chosen) != len(shapes[name]):
            raise InputError(f"sizes[{name!r}] names {len(chosen)} dimensions; {name} has {len(shapes[name])}")
        for label, size in zip(chosen, shapes[name], strict=True):
            if label is not None and sizes.setdefault(label, size) != size:
                raise InputError(f"size {label!r} is {sizes[label]} in one input and {size} in {name}; use two names")
        labels[name] = tuple(chosen)
    free = [letter for letter in _LETTERS if letter not in sizes]
    known: dict[tuple[int, int], str] = {}
    for name, shape in shapes.items():
        if name not in labels:
            for place in enumerate(shape):
                if place not in known:
                    known[place] = _label(*place, sizes, free)
                    sizes[known[place]] = place[1]
            labels[name] = tuple(known[place] for place in enumerate(shape))
    return labels


def _label(dim: int, size: int, sizes: Mapping[str, int], free: list[str]) -> str:
    preferred = "BS"[dim] if dim < 2 else ""
    if preferred and sizes.get(preferred, size) == size:
        return preferred
    return free.pop(0) if free else f"N{len(sizes)}"
