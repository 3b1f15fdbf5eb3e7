"""Evaluating a masked network for a window of places: of every bank only the slice that the window can still change.

    window [s, e):  units of degree < s are settled, units of degree >= e - 1 are not needed

What settled units contribute to an affine map is added up once per window, so a sweep multiplies only (changing x changing) blocks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .units import Affine, Bank, Columns, Cut, Pointwise, Units

BAND, BAND_ROWS = 128, 8
"""Units of a bank multiplied at once: later units read more columns, so a band of them skips the zeros of the bands before. With
fewer rows in the batch, a product costs too little for that to pay."""

MOST_PLANS = 256


@dataclass(frozen=True)
class Plan:
    """A window, prepared once: views and memory. first: what is computed when it begins; sweep: what each sweep computes; read:
    gathers the parameters; settled: of every bank, the units that are settled once it has begun."""

    first: tuple[Callable[[], object], ...]
    sweep: tuple[Callable[[], object], ...]
    read: Callable[[], Tensor]
    settled: tuple[int, ...]


class SlicedNet:
    """The units of a network with the values of a batch.

    ``inputs`` is ``[rows, places]`` in order of generation: write the window's columns, then ``parameters()`` gives
    ``[rows, window, ...]``.
    """

    def __init__(self, units: Units, rows: int, dtype: torch.dtype) -> None:
        self._units = units
        self._values = [torch.zeros(rows, len(bank.degrees), dtype=dtype) for bank in units.banks]
        self._plans: dict[tuple[int, int, tuple[int, ...]], Plan] = {}
        self._settled = (0,) * len(units.banks)
        self._plan = Plan((), (), self._values[0].clone, self._settled)

    @property
    def inputs(self) -> Tensor:
        """The values of the places, in order of generation."""
        return self._values[0]

    def restart(self) -> None:
        """Forget all values; what was prepared for windows stays."""
        self.inputs.zero_()
        self._settled = (0,) * len(self._settled)

    def begin(self, start: int, end: int) -> None:
        """Move to the window of places ``[start, end)``; all places before it are settled."""
        key = (start, end, self._settled)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = self._plans[key] = self._prepared(start, end)
        for compute in plan.first:
            compute()
        self._settled, self._plan = plan.settled, plan

    def parameters(self) -> Tensor:
        """The parameters of the window's places, from the present values of its columns."""
        for compute in self._plan.sweep:
            compute()
        return self._plan.read()

    def settle(self, place: int) -> None:
        """The places before ``place`` keep the values from which the last parameters were computed."""
        self._settled = tuple(max(bank.below(place), n) for bank, n in zip(self._units.banks, self._settled, strict=True))

    def _prepared(self, start: int, end: int) -> Plan:
        cut = self._units.cut(start, end)
        first: list[Callable[[], object]] = []
        sweep: list[Callable[[], object]] = []
        settled = list(self._settled)
        for index, bank in enumerate(self._units.banks[1:], 1):
            low, high = cut.slices[index]
            if low > settled[index]:
                out = self._values[index][:, settled[index] : low]
                if isinstance(bank.rule, Pointwise):
                    first.append(self._pointwise(bank.rule, out, settled[index], low))
                else:
                    first += self._from_settled(bank.rule, out, (settled[index], low), cut.slices)
                settled[index] = low
            if low < high and isinstance(bank.rule, Pointwise):
                sweep.append(self._pointwise(bank.rule, self._values[index][:, low:high], low, high))
            elif low < high:
                base = self.inputs.new_empty(self.inputs.shape[0], high - low)
                first += self._from_settled(bank.rule, base, (low, high), cut.slices)
                sweep += self._changing(index, bank, cut.slices, base)
        return Plan(tuple(first), tuple(sweep), self._reader(cut, end - start), tuple(settled))

    def _changing(self, index: int, bank: Bank, slices: tuple[tuple[int, int], ...], base: Tensor) -> list[Callable[[], object]]:
        """What computes the units of an affine bank that the window changes. base: what settled units contribute."""
        low, high = slices[index]
        bands = -(-(high - low) // BAND) if self.inputs.shape[0] >= BAND_ROWS else 1
        edges = [low + (high - low) * k // bands for k in range(bands + 1)]
        return [self._band(index, bank, slices, (a, b, base[:, a - low : b - low])) for a, b in itertools.pairwise(edges)]

    def _band(
        self, index: int, bank: Bank, slices: tuple[tuple[int, int], ...], part: tuple[int, int, Tensor]
    ) -> Callable[[], object]:
        """What computes neighbouring units of an affine bank: they read the changing units up to the last degree among them."""
        assert isinstance(bank.rule, Affine)
        low, high, base = part
        out, degree = self._values[index][:, low:high], int(bank.degrees[high - 1])
        blocks = []
        for source, weight in bank.rule.sources:
            first, last = slices[source]
            last = min(last, self._units.banks[source].below(degree + 1))
            if first < last:
                blocks.append((self._values[source][:, first:last], weight[low:high, first:last].t()))
        if not blocks:
            return lambda: out.copy_(base)
        *earlier, (values, weight) = blocks

        def compute() -> None:
            total = base
            for block in earlier:
                total = torch.addmm(total, *block)
            torch.addmm(total, values, weight, out=out)

        return compute

    def _from_settled(
        self, rule: Affine | Pointwise | None, out: Tensor, part: tuple[int, int], slices: tuple[tuple[int, int], ...]
    ) -> list[Callable[[], object]]:
        """What writes bias + weight @ source over the settled units of each source; at once where there are none."""
        assert isinstance(rule, Affine)
        low, high = part
        bias = self.inputs.new_zeros(1, high - low) if rule.bias is None else rule.bias[None, low:high]
        blocks = [
            (self._values[source][:, : slices[source][0]], weight[low:high, : slices[source][0]].t())
            for source, weight in rule.sources
            if slices[source][0]
        ]
        if not blocks:
            return [lambda: out.copy_(bias)]
        steps: list[Callable[[], object]] = [functools.partial(torch.addmm, bias, *blocks[0], out=out)]
        return steps + [functools.partial(torch.addmm, out, *block, out=out) for block in blocks[1:]]

    def _pointwise(self, rule: Pointwise, out: Tensor, low: int, high: int) -> Callable[[], object]:
        if any(isinstance(operand, Columns) and operand.first is None for operand in rule.operands):
            return lambda: out.copy_(rule.function(*[self._operand(o, low, high) for o in rule.operands], **rule.options))
        operands = [self._operand(operand, low, high) for operand in rule.operands]
        return lambda: out.copy_(rule.function(*operands, **rule.options))

    def _operand(self, operand: Any, low: int, high: int) -> Any:
        if isinstance(operand, Columns):
            values, first = self._values[operand.bank], operand.first
            if first is None:
                return values.index_select(1, operand.index[low:high])
            return values[:, first + low : first + high]
        return operand[low:high] if isinstance(operand, Tensor) else operand

    def _reader(self, cut: Cut, count: int) -> Callable[[], Tensor]:
        """What gathers the window's parameters from the banks they lie in."""
        shape = (self.inputs.shape[0], count, *self._units.shape)
        reads = [(self._values[bank], columns) for bank, columns in cut.reads]
        if cut.back is None:
            ((values, columns),) = reads
            if isinstance(columns, slice):
                view = values[:, columns]
                return lambda: view.reshape(shape)
            return lambda: values.index_select(1, columns).reshape(shape)
        back = cut.back
        return lambda: torch.cat([values[:, columns] for values, columns in reads], dim=1)[:, back].reshape(shape)
