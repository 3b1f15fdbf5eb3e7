"""What each element of a masked network depends on, and the network as banks of units sorted by it.

For a masked autoregressive network (MADE, arXiv 1502.03509) the weights' zeros say which outputs need which inputs. This module
reads them off the captured graph: layout ops become index arrays, an affine map or a pointwise op becomes a *bank* of units, and

    degree(unit) = max over its sources of degree,        degree(input at place p) = p,        degree(constant) = -1

so that a unit of degree d is settled once places 0..d are. Banks are sorted by degree: the units that a window of places can still
change are a slice of every bank.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.fx as fx
from torch import Tensor

from ..program import Program, RoleKind, note

aten = torch.ops.aten
LAYOUT = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.transpose.int,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.cat.default,
        aten.clone.default,
        aten.alias.default,
        aten.detach.default,
        operator.getitem,
    }
)
AFFINE = frozenset({aten.addmm.default, aten.mm.default})
ROWS = 2  # rows of the batch that the graph is captured with


class UnsliceableError(Exception):
    """The network computes something that this module doesn't follow; the message says what and where."""


@dataclass(frozen=True)
class Affine:
    """out = bias + sum over sources of weight @ source. sources: (bank, weight ``[units, units of the source]``), both sorted."""

    sources: tuple[tuple[int, Tensor], ...]
    bias: Tensor | None


@dataclass(frozen=True)
class Pointwise:
    """out = function(operands). An operand is (bank, columns), a constant per unit, or anything that is no tensor."""

    function: Callable[..., Tensor]
    operands: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """One unit of a bank for each unit of the reader."""

    bank: int
    index: Tensor

    @functools.cached_property
    def first(self) -> int | None:
        """The first of them where they follow one another, so that a slice will do."""
        found = _neighbours(self.index)
        return found.start if isinstance(found, slice) else None


@dataclass(frozen=True)
class Bank:
    """Units computed together. degrees: int64 ``[units]``, ascending; rule: None for the inputs."""

    degrees: Tensor
    rule: Affine | Pointwise | None

    def below(self, degree: int) -> int:
        """How many units have a smaller degree."""
        return int(torch.searchsorted(self.degrees, degree))


@dataclass(frozen=True)
class Cut:
    """A window's part of the banks. slices: of every bank, the units that the window can change; reads: per bank that parameters
    lie in, (bank, columns as a slice or an index); back: where each of those belongs, None if they are in order.
    """

    slices: tuple[tuple[int, int], ...]
    reads: tuple[tuple[int, slice | Tensor], ...]
    back: Tensor | None


@dataclass(frozen=True)
class Units:
    """banks: in order of computation, the inputs first; outputs: per place, then per parameter, (bank, unit): int64 ``[places, k,
    2]``; shape: of one place's parameters.
    """

    banks: tuple[Bank, ...]
    outputs: Tensor
    shape: tuple[int, ...]
    _cuts: dict[tuple[int, int], Cut] = field(default_factory=dict, repr=False, compare=False)

    def cut(self, start: int, end: int) -> Cut:
        """The part of a window of places ``[start, end)``; made once."""
        if (start, end) not in self._cuts:
            self._cuts[start, end] = self._cut(start, end)
        return self._cuts[start, end]

    def _cut(self, start: int, end: int) -> Cut:
        slices = tuple((bank.below(start), bank.below(end - 1)) for bank in self.banks)
        wanted = self.outputs[start:end].reshape(-1, 2)
        banks = wanted[:, 0].unique().tolist()
        at = [(wanted[:, 0] == bank).nonzero().flatten() for bank in banks]
        reads = tuple((bank, _neighbours(wanted[:, 1][where])) for bank, where in zip(banks, at, strict=True))
        return Cut(slices, reads, torch.cat(at).argsort() if len(banks) > 1 else None)

    def degree_of_outputs(self) -> Tensor:
        """Largest degree among the parameters of each place, int64 ``[places]``."""
        found = torch.full(self.outputs.shape[:2], -1)
        for index, bank in enumerate(self.banks):
            mine = self.outputs[..., 0] == index
            found[mine] = bank.degrees[self.outputs[..., 1][mine]]
        return found.amax(dim=1)


def find_units(program: Program, tensors: Mapping[str, Tensor], place: Tensor) -> Units:
    """Follow a captured network ``[rows, positions] -> [rows, positions, ...]``.

    tensors: its parameters and buffers by name; place: of each position in the order of generation, int64 ``[positions]``.

    Raises UnsliceableError where a node is neither an affine map, a pointwise op nor a change of layout.
    """
    roles = list(zip(program.placeholders, program.signature.inputs, strict=True))
    finder = _Finder(place, next(node.meta["val"].dtype for node, role in roles if role.kind is RoleKind.INPUT))
    for node, role in roles:
        if role.kind is RoleKind.INPUT:
            finder.ids[node] = torch.arange(len(place)).expand(ROWS, -1)
        else:
            finder.constants[node] = program.constants[role.name] if role.kind is RoleKind.CONSTANT else tensors[role.name]
    return finder.run(program)


class _Finder:
    """Units have ids over all banks, in the order of the graph; a bank keeps where each went when it was sorted."""

    def __init__(self, place: Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.ids: dict[fx.Node, Any] = {}
        self.constants: dict[fx.Node, Any] = {}
        self._first: list[int] = []  # id of each bank's first unit
        self._rank: list[Tensor] = []  # where it is sorted to
        self._banks: list[Bank] = []
        self._add(place, lambda _: None)

    def run(self, program: Program) -> Units:
        """Visit the nodes in order."""
        for node in program.nodes:
            if node.op == "call_function":
                self._visit(node)
        (result,) = [r for r in program.results[:1] if r is not None]
        if result not in self.ids:
            raise UnsliceableError("the result does not depend on the input")
        ids = one_row(self.ids[result], result)
        flat = ids.reshape(ids.shape[0], -1)
        return Units(tuple(self._banks), torch.stack(self._located(flat), dim=-1), tuple(ids.shape[1:]))

    def _visit(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if all(n in self.constants for n in inputs):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.constants[n])
            self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.target in LAYOUT:
            if not all(n in self.ids for n in inputs):
                raise UnsliceableError(f"{node.target} joins computed elements and constants ({note(node).source})")
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.ids[n])
            self.ids[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.target in AFFINE and not node.kwargs:
            self.ids[node] = self._affine(node)
        elif isinstance(node.target, torch._ops.OpOverload) and is_pointwise(node.target):
            self.ids[node] = self._pointwise(node)
        else:
            raise UnsliceableError(f"{node.target} is neither affine, pointwise nor a change of layout ({note(node).source})")

    def _affine(self, node: fx.Node) -> Tensor:
        *bias, source, weight = cast(tuple[fx.Node, ...], node.args)
        if source not in self.ids or weight not in self.constants or any(b not in self.constants for b in bias):
            raise UnsliceableError(f"{node.target} multiplies computed elements with each other ({note(node).source})")
        read = one_row(self.ids[source], node)
        matrix = self.constants[weight].detach().t()  # [out, in]
        banks, columns = self._located(read)
        degrees = self._degrees(banks, columns)
        reached = torch.where(matrix != 0, degrees, -1).amax(dim=1) if matrix.shape[1] else torch.full((len(matrix),), -1)
        shift = self.constants[bias[0]].detach().expand(len(matrix)) if bias else None

        def rule(order: Tensor) -> Affine:
            sources = []
            for bank in banks.unique().tolist():
                mine = banks == bank
                spread = matrix.new_zeros((len(matrix), len(self._banks[bank].degrees)))
                spread.index_add_(1, columns[mine], matrix[:, mine])
                sources.append((bank, spread[order].contiguous()))
            return Affine(tuple(sources), None if shift is None else shift[order].contiguous())

        return self._add(reached, rule).expand(ROWS, -1)

    def _pointwise(self, node: fx.Node) -> Tensor:
        value = node.meta["val"]
        if value.dtype != self._dtype or any(isinstance(v, fx.Node) for v in node.kwargs.values()):
            raise UnsliceableError(f"{node.target} gives {value.dtype}, not {self._dtype} ({note(node).source})")
        shape = value.shape
        read = {n: self.ids[n].expand(shape) for n in node.all_input_nodes if n in self.ids}
        rows = {n: one_row(ids, node).reshape(-1) for n, ids in read.items()}
        located = {n: self._located(row) for n, row in rows.items()}
        degrees = torch.stack([self._degrees(*where) for where in located.values()]).amax(dim=0)

        def rule(order: Tensor) -> Pointwise:
            def operand(value: Any) -> Any:
                if not isinstance(value, fx.Node):
                    return value
                if value in self.constants:
                    return self._spread(self.constants[value], shape, node)[order]
                banks, columns = located[value]
                if len(banks.unique()) > 1:
                    raise UnsliceableError(f"{node.target} reads elements of several layers at once ({note(node).source})")
                return Columns(int(banks[0]), columns[order])

            return Pointwise(node.target, tuple(operand(a) for a in node.args), dict(node.kwargs))  # type: ignore[arg-type]

        return self._add(degrees, rule).reshape(shape[1:]).expand(shape)

    def _spread(self, constant: Any, shape: torch.Size, node: fx.Node) -> Any:
        """A constant operand, one value per unit; it must be the same for all rows of the batch."""
        if constant.dim() == len(shape) and constant.shape[0] != 1:
            raise UnsliceableError(f"{node.target} has a constant that differs from row to row ({note(node).source})")
        return constant.detach().expand(shape)[0].reshape(-1)

    def _add(self, degrees: Tensor, rule: Callable[[Tensor], Affine | Pointwise | None]) -> Tensor:
        """A new bank; the ids of its units in the order of the graph."""
        order = torch.sort(degrees, stable=True).indices
        made = rule(order)
        first = self._first[-1] + len(self._rank[-1]) if self._first else 0
        self._first.append(first)
        self._rank.append(torch.empty_like(order).index_copy_(0, order, torch.arange(len(order))))
        self._banks.append(Bank(degrees[order], made))
        return torch.arange(first, first + len(order))

    def _located(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(bank, sorted place in it) of every id."""
        banks = torch.searchsorted(torch.tensor(self._first), ids, right=True) - 1
        return banks, torch.cat(self._rank)[ids]

    def _degrees(self, banks: Tensor, columns: Tensor) -> Tensor:
        found = torch.empty_like(columns)
        for bank in banks.unique().tolist():
            found[banks == bank] = self._banks[bank].degrees[columns[banks == bank]]
        return found


def _neighbours(columns: Tensor) -> slice | Tensor:
    """A slice where the columns follow one another."""
    first = int(columns[0])
    return slice(first, first + len(columns)) if bool((columns.diff() == 1).all()) else columns.contiguous()


def is_pointwise(target: torch._ops.OpOverload) -> bool:
    """Whether an op works element by element and draws no random numbers."""
    return torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags


def one_row(ids: Sequence[Any] | Tensor, node: fx.Node) -> Tensor:
    """Ids of one row of the batch; all rows are alike unless a layout op mixed them."""
    if not isinstance(ids, Tensor) or ids.dim() < 2 or ids.shape[0] != ROWS or not torch.equal(ids[0], ids[1]):
        raise UnsliceableError(f"{node.target} mixes the rows of the batch ({note(node).source})")
    return ids[0]
