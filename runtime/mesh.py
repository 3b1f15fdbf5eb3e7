"""Named axes of devices: ``Mesh.parse("dp=2,tp=4")``. Ranks are row-major, the last axis varies fastest (as in DeviceMesh)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import InputError

_AXIS = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\s*=\s*([0-9]+)")


@dataclass(frozen=True)
class Mesh:
    """An n-dimensional grid of ranks.

    axes: ``((name, size), ...)``, sizes >= 1, names unique. Raises InputError otherwise.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if not self.axes or len(set(names)) != len(names) or any(size < 1 for _, size in self.axes):
            raise InputError(f"a mesh needs at least one axis, unique names and sizes >= 1; found {self.axes!r}")

    @classmethod
    def parse(cls, text: str | int | Mesh) -> Mesh:
        """Read ``"tp=2"`` or ``"dp=2,tp=2"``; a bare number n means ``"d=n"``, one axis left to the planner."""
        if isinstance(text, Mesh):
            return text
        if isinstance(text, int) and not isinstance(text, bool):
            return cls((("d", text),))
        if not isinstance(text, str):
            raise InputError(f'mesh must be a string such as "dp=2,tp=2", an int or a Mesh; found {text!r}')
        if text.strip().isdecimal():
            return cls((("d", int(text)),))
        parts = [part.strip() for part in text.split(",")]
        found = [_AXIS.fullmatch(part) for part in parts]
        bad = [part for part, match in zip(parts, found, strict=True) if match is None]
        if bad:
            raise InputError(f'mesh {text!r}: expected NAME=SIZE, found {bad[0]!r}; write for example "dp=2,tp=2"')
        return cls(tuple((m.group(1), int(m.group(2))) for m in found if m is not None))

    @property
    def names(self) -> tuple[str, ...]:
        """Axis names, outermost first."""
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Axis sizes, outermost first."""
        return tuple(size for _, size in self.axes)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(self.shape)

    def axis_size(self, name: str) -> int:
        """Size of one axis; InputError when there is no such axis."""
        for axis, size in self.axes:
            if axis == name:
                return size
        raise InputError(f"mesh {self} has no axis {name!r}; it has {', '.join(self.names)}")

    def coordinate(self, rank: int) -> dict[str, int]:
        """Where a rank sits: axis name -> index."""
        if not 0 <= rank < self.size:
            raise InputError(f"rank {rank} is outside mesh {self} of {self.size} ranks")
        where = {}
        for name, size in reversed(self.axes):
            rank, where[name] = divmod(rank, size)
        return {name: where[name] for name in self.names}

    def rank(self, coordinate: dict[str, int]) -> int:
        """Inverse of ``coordinate``."""
        rank = 0
        for name, size in self.axes:
            rank = rank * size + coordinate[name]
        return rank

    def group(self, axis: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from ``rank`` along ``axis`` only, in order of their index on it."""
        where = self.coordinate(rank)
        return tuple(self.rank({**where, axis: index}) for index in range(self.axis_size(axis)))

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Every group of ``axis``: a partition of all ranks."""
        return tuple(sorted({self.group(axis, rank) for rank in range(self.size)}))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)
