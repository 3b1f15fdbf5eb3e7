"""Evaluating a masked network for a window of places: of every bank only the slice that the window can still change.

    window [s, e):  units of degree < s are settled, units of degree >= e - 1 are not needed

What settled units contribute to an affine map is added up once per window, so a sweep multiplies only (changing x changing) blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .units import Affine, Bank, Columns, Cut, Pointwise, Units

BAND, BAND_ROWS = 128, 8
"""Units of a bank multiplied at once: later units read more columns, so a band of them skips the zeros of the bands before. With
fewer rows in the batch, a product costs too little for that to pay."""


class SlicedNet:
    """The units of a network with the values of a batch.

    ``inputs`` is ``[rows, places]`` in order of generation: write the window's columns, then ``parameters()`` gives
    ``[rows, window, ...]``.
    """

    def __init__(self, units: Units, rows: int, dtype: torch.dtype) -> None:
        self._units = units
        self._values = [torch.zeros(rows, len(bank.degrees), dtype=dtype) for bank in units.banks]
        self._settled = [0] * len(units.banks)
        self._slices: tuple[tuple[int, int], ...] = ()
        self._sweep: list[Callable[[], object]] = []
        self._read: Callable[[], Tensor] = self._values[0].clone

    @property
    def inputs(self) -> Tensor:
        """The values of the places, in order of generation."""
        return self._values[0]

    def begin(self, start: int, end: int) -> None:
        """Move to the window of places ``[start, end)``; all places before it are settled."""
        cut = self._units.cut(start, end)
        self._slices = cut.slices
        self._sweep = []
        for index, bank in enumerate(self._units.banks[1:], 1):
            low, high = self._slices[index]
            if low > self._settled[index]:
                self._settling(index, bank, (self._settled[index], low))
                self._settled[index] = low
            if low < high:
                self._sweep += self._changing(index, bank, (low, high))
        self._read = self._reader(cut, end - start)

    def parameters(self) -> Tensor:
        """The parameters of the window's places, from the present values of its columns."""
        for compute in self._sweep:
            compute()
        return self._read()

    def settle(self, place: int) -> None:
        """The places before ``place`` keep the values from which the last parameters were computed."""
        self._settled = [max(bank.below(place), known) for bank, known in zip(self._units.banks, self._settled, strict=True)]

    def _settling(self, index: int, bank: Bank, part: tuple[int, int]) -> None:
        """Compute units whose sources are all settled."""
        low, high = part
        out = self._values[index][:, low:high]
        if isinstance(bank.rule, Pointwise):
            self._pointwise(bank.rule, out, low, high)()
            return
        assert isinstance(bank.rule, Affine)
        out.copy_(self._from_settled(bank.rule, low, high))

    def _changing(self, index: int, bank: Bank, part: tuple[int, int]) -> list[Callable[[], object]]:
        """What computes some units of a bank: views are made here, once a window, not in every sweep."""
        low, high = part
        if isinstance(bank.rule, Pointwise):
            return [self._pointwise(bank.rule, self._values[index][:, low:high], low, high)]
        assert isinstance(bank.rule, Affine)
        base = self._from_settled(bank.rule, low, high)
        bands = -(-(high - low) // BAND) if self.inputs.shape[0] >= BAND_ROWS else 1
        edges = [low + (high - low) * k // bands for k in range(bands + 1)]
        return [self._band(index, bank, (a, b), base[:, a - low : b - low]) for a, b in itertools.pairwise(edges)]

    def _band(self, index: int, bank: Bank, part: tuple[int, int], base: Tensor) -> Callable[[], object]:
        """What computes neighbouring units of an affine bank: they read the changing units up to the last degree among them."""
        assert isinstance(bank.rule, Affine)
        low, high = part
        out, degree = self._values[index][:, low:high], int(bank.degrees[high - 1])
        blocks = []
        for source, weight in bank.rule.sources:
            first, last = self._slices[source]
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

    def _from_settled(self, rule: Affine, low: int, high: int) -> Tensor:
        """bias + weight @ source over the settled units of each source."""
        count = self.inputs.shape[0]
        total = self.inputs.new_zeros(count, high - low) if rule.bias is None else rule.bias[low:high].expand(count, -1)
        for source, weight in rule.sources:
            settled = self._slices[source][0]
            if settled:
                total = torch.addmm(total, self._values[source][:, :settled], weight[low:high, :settled].t())
        return total

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
