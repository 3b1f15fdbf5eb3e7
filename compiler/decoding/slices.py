"""Evaluating a masked network for a window of places: of every bank only the slice that the window can still change.

    window [s, e):  units of degree < s are settled, units of degree >= e - 1 are not needed

What settled units contribute to an affine map is added up once per window, so a sweep multiplies only (changing x changing) blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .units import Affine, Bank, Columns, Pointwise, Units


class SlicedNet:
    """The units of a network with the values of a batch. places: input places in order of generation.

    ``inputs`` is ``[rows, places]``: write the window's columns, then ``parameters()`` gives ``[rows, window, ...]``.
    """

    def __init__(self, units: Units, rows: int, dtype: torch.dtype) -> None:
        self._units = units
        self._values = [torch.zeros(rows, len(bank.degrees), dtype=dtype) for bank in units.banks]
        self._settled = [0] * len(units.banks)
        self._window = (0, 0)
        self._slices: list[tuple[int, int]] = []
        self._base: dict[int, Tensor] = {}
        self._reads: list[tuple[int, Tensor, Tensor]] = []

    @property
    def inputs(self) -> Tensor:
        """The values of the places, in order of generation."""
        return self._values[0]

    def begin(self, start: int, end: int) -> None:
        """Move to the window of places ``[start, end)``; all places before it are settled."""
        self._window = (start, end)
        self._slices = [(bank.below(start), bank.below(end - 1)) for bank in self._units.banks]
        for index, bank in enumerate(self._units.banks[1:], 1):
            low, _ = self._slices[index]
            if low > self._settled[index]:
                self._compute(index, bank, self._settled[index], low)
                self._settled[index] = low
        self._base = {
            index: self._from_settled(bank.rule, *self._slices[index])
            for index, bank in enumerate(self._units.banks)
            if isinstance(bank.rule, Affine) and self._slices[index][0] < self._slices[index][1]
        }
        wanted = self._units.outputs[start:end].reshape(-1, 2)
        self._reads = [(bank, wanted[:, 1][at], at) for bank, at in _by_bank(wanted[:, 0])]

    def parameters(self) -> Tensor:
        """The parameters of the window's places, from the present values of its columns."""
        for index, bank in enumerate(self._units.banks[1:], 1):
            low, high = self._slices[index]
            if low < high:
                self._values[index][:, low:high] = self._changing(index, bank, low, high)
        start, end = self._window
        parts = [self._values[bank].index_select(1, columns) for bank, columns, _ in self._reads]
        flat = parts[0]
        if len(parts) > 1:
            flat = torch.cat(parts, dim=1)[:, torch.cat([at for *_, at in self._reads]).argsort()]
        return flat.reshape(flat.shape[0], end - start, *self._units.shape)

    def end(self, *, is_current: bool) -> None:
        """Leave the window. is_current: whether the last parameters came from the values its columns have now."""
        if is_current:
            self._settled = [max(high, low) for low, high in self._slices]

    def _compute(self, index: int, bank: Bank, low: int, high: int) -> None:
        rule = bank.rule
        if isinstance(rule, Affine):
            limit = int(bank.degrees[high - 1]) + 1
            out = self._sum(rule, (low, high), [(0, self._units.banks[source].below(limit)) for source, _ in rule.sources])
            self._values[index][:, low:high] = out if rule.bias is None else out + rule.bias[low:high]
        else:
            self._values[index][:, low:high] = self._changing(index, bank, low, high)

    def _from_settled(self, rule: Affine, low: int, high: int) -> Tensor:
        out = self._sum(rule, (low, high), [(0, self._slices[source][0]) for source, _ in rule.sources])
        return out if rule.bias is None else out + rule.bias[low:high]

    def _changing(self, index: int, bank: Bank, low: int, high: int) -> Tensor:
        rule = bank.rule
        if isinstance(rule, Affine):
            out = self._base[index]
            for source, weight in rule.sources:
                first, last = self._slices[source]
                if first < last:
                    out = torch.addmm(out, self._values[source][:, first:last], weight[low:high, first:last].t())
            return out
        assert isinstance(rule, Pointwise)
        operands = [self._operand(operand, low, high) for operand in rule.operands]
        return rule.function(*operands, **rule.options)

    def _operand(self, operand: Any, low: int, high: int) -> Any:
        if isinstance(operand, Columns):
            if operand.is_ascending:
                first = operand.first
                return self._values[operand.bank][:, first + low : first + high]
            return self._values[operand.bank].index_select(1, operand.index[low:high])
        return operand[low:high] if isinstance(operand, Tensor) else operand

    def _sum(self, rule: Affine, rows: tuple[int, int], columns: list[tuple[int, int]]) -> Tensor:
        low, high = rows
        out = self.inputs.new_zeros(self.inputs.shape[0], high - low)
        for (source, weight), (first, last) in zip(rule.sources, columns, strict=True):
            if first < last:
                out = torch.addmm(out, self._values[source][:, first:last], weight[low:high, first:last].t())
        return out


def _by_bank(banks: Tensor) -> list[tuple[int, Tensor]]:
    return [(bank, (banks == bank).nonzero().flatten()) for bank in banks.unique().tolist()]
