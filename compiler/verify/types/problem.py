"""How typing a node can fail, and what a rule is told about its node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.fx as fx

from ...layout import Layout
from ...program import note
from .value import Axes, Cut, Dim, Integer, Type


class IllTyped(Exception):
    """The node is wrong on some rank. The message says how; operands are the arguments that it talks about."""

    def __init__(self, message: str, *operands: int) -> None:
        super().__init__(message)
        self.operands = operands


class Untypable(Exception):
    """The types cannot judge the node: it may be right, an execution has to tell."""


class Moved(NamedTuple):
    """The same pieces read as another global tensor: mesh axes stand at other places, local factors where they were.

    Any such reading is right as long as the 1-rank program is changed alike; ``erase`` turns it into a permutation.
    """

    before: tuple[Dim, ...]
    after: tuple[Dim, ...]


class Op:
    """One node while it is typed: what the rules may ask, and where they leave what erasure needs.

    target: the op that the 1-rank program calls instead, None for the same; new_args: arguments (by schema position) that differ
    in it; becomes: argument that replaces the node in it (-1: none); moves_in, moves_out: changes of reading before and after the
    op; times: factor on the result in the 1-rank program; undo_scale: (argument, number of ranks) where it stands for what it was
    before a division by that number; look_ahead: the declared type of the first declared node behind this one;
    ambiguous: a view placed an axis that cut a dimension into pieces of length 1, which may belong to either neighbour, and
    ``flipped`` asks for the other one.
    """

    __slots__ = (
        "ambiguous",
        "axes",
        "becomes",
        "flipped",
        "hints",
        "look_ahead",
        "moves_in",
        "moves_out",
        "new_args",
        "node",
        "target",
        "times",
        "undo_scale",
    )

    def __init__(self, axes: Axes, node: fx.Node, hints: tuple[tuple[tuple[int, ...], Layout] | None, ...]) -> None:
        self.axes = axes
        self.node = node
        self.hints = hints
        self.target: Any = None
        self.new_args: dict[int, Any] = {}
        self.becomes = -1
        self.moves_in: list[Moved] = []
        self.moves_out: list[Moved] = []
        self.times: int | None = None
        self.undo_scale: list[tuple[int, int]] = []
        self.ambiguous = False
        self.flipped = False
        self.look_ahead: Callable[[], Type | None] | None = None

    def wrong(self, message: str, *operands: int) -> IllTyped | Untypable:
        """What to raise where an op of the user's program would be wrong, but a step that a pass added may still be right as a part
        of a longer move between layouts."""
        return Untypable(message) if note(self.node).added_by else IllTyped(message, *operands)

    def hint(self, output: int = 0) -> Type | None:
        """The declared type of an output. Rules use it to choose among readings that are all right, never as evidence."""
        if output >= len(self.hints):
            return None
        found = self.hints[output]
        return None if found is None else self.axes.from_layout(*found)

    def hinted_dims(self, output: int = 0) -> dict[int, int]:
        """mesh axis -> dimension that the declared layout cuts with it."""
        hint = self.hint(output)
        return {} if hint is None else hint.cut_axes()

    def uniform(self, sizes: list[Integer], free: set[int] | None = None) -> tuple[Dim, ...]:
        """Dims of a value that is constant along ``free`` dimensions (default all), of which each rank makes ``sizes``.

        Any cut of such dimensions is right, so the declared one is taken.
        """
        hint = self.hint()
        dims = []
        for position, size in enumerate(sizes):
            axes = [] if hint is None or position >= hint.rank else [cut.axis for cut in hint.dims[position].cuts]
            if free is not None and position not in free:
                axes = []
            dims.append(self._uniform_dim(size, axes))
        return tuple(dims)

    def _uniform_dim(self, size: Integer, axes: list[int]) -> Dim:
        if isinstance(size, int):
            return self.axes.prefix(size * self.axes.product([Cut(axis, 1) for axis in axes]), axes)
        varying = [axis for axis, n in enumerate(size.shape) if n > 1]
        dim = self.axes.prefix(int(size.sum()), varying)
        if not (self.axes.length(dim) == size).all():
            raise Untypable("the sizes on the ranks are not the chunks of one dimension")
        return dim
