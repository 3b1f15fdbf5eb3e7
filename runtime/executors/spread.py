"""Values of many ranks in one process, kept once where ranks hold the same object.

A ``Partition`` puts ranks into classes; a ``Spread`` is one value per class. An op on operands of several partitions runs once per
class of their join. So replicated work, and all that follows an all_reduce over the whole mesh, runs once for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..mesh import Mesh


@dataclass(frozen=True, eq=False)
class Partition:
    """rank -> class; classes are numbered by their first rank, ``firsts``."""

    of: tuple[int, ...]
    firsts: tuple[int, ...]


class Spread(NamedTuple):
    """One value per class of a partition."""

    partition: Partition
    values: list[Any]

    def at(self, rank: int) -> Any:
        """The value that a rank holds."""
        return self.values[self.partition.of[rank]]


class Join(NamedTuple):
    """The coarsest partition finer than several others; per operand, the class of it that each joined class lies in."""

    partition: Partition
    indices: tuple[tuple[int, ...], ...]


class Groups(NamedTuple):
    """A collective of one partition on one axis. Groups whose members hold the same classes are of one kind.

    members: one group of each kind; same, own: the partitions of results, per kind or per kind and index on the axis.
    """

    members: tuple[tuple[int, ...], ...]
    same: Partition
    own: Partition


@dataclass
class Partitions:
    """All partitions of a mesh met so far: equal ones are the same object, joins are remembered."""

    mesh: Mesh
    _known: dict[tuple[int, ...], Partition] = field(default_factory=dict)
    _joins: dict[tuple[Partition, ...], Join] = field(default_factory=dict)
    _groups: dict[tuple[Partition, str], Groups] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = self.by(lambda _: 0)
        self.finest = self.by(lambda rank: rank)

    def by(self, key: Callable[[int], Hashable]) -> Partition:
        """Ranks of equal keys in one class."""
        numbers: dict[Hashable, int] = {}
        firsts: list[int] = []
        of = []
        for rank in range(self.mesh.size):
            number = numbers.setdefault(key(rank), len(firsts))
            if number == len(firsts):
                firsts.append(rank)
            of.append(number)
        return self._known.setdefault(tuple(of), Partition(tuple(of), tuple(firsts)))

    def spread(self, values: Sequence[Any], key: Callable[[Any], Hashable] = id) -> Spread:
        """One value per rank, kept once per distinct key (identity by default)."""
        if len(values) == 1:
            return Spread(self.whole, list(values))
        partition = self.by(lambda rank: key(values[rank]))
        return Spread(partition, [values[rank] for rank in partition.firsts])

    def join(self, partitions: tuple[Partition, ...]) -> Join:
        """See ``Join``."""
        known = self._joins.get(partitions)
        if known is None:
            joined = self.by(lambda rank: tuple(p.of[rank] for p in partitions))
            known = Join(joined, tuple(tuple(p.of[rank] for rank in joined.firsts) for p in partitions))
            self._joins[partitions] = known
        return known

    def groups(self, partition: Partition, axis: str) -> Groups:
        """See ``Groups``."""
        known = self._groups.get((partition, axis))
        if known is None:
            key_of = {}
            for members in self.mesh.groups(axis):
                key = tuple(partition.of[rank] for rank in members)
                for index, rank in enumerate(members):
                    key_of[rank] = (key, index, members)
            same = self.by(lambda rank: key_of[rank][0])
            own = self.by(lambda rank: key_of[rank][:2])
            known = Groups(tuple(key_of[rank][2] for rank in same.firsts), same, own)
            self._groups[partition, axis] = known
        return known
