"""How many bytes a rank holds while it runs a program, found without running it.

    held at an instruction  =  every input  +  each other value from the instruction that makes it to the one that frees it

Views share the memory of what they are views of. Inputs count from the first instruction to the last, since parameters, buffers and
batches lie in the caller's memory. Scratch memory inside a kernel, and the blocks that an allocator keeps, are not known here.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch._subclasses import FakeTensorMode

from .ports import Piece
from .program import RankProgram
from .shapes import run_fake
from .templates import Site


def peak_bytes(program: RankProgram, rank: int = 0) -> int:
    """Most bytes that ``rank`` holds at once. Raises what an op's fake implementation raises where it has none."""
    site = Site.of(program.mesh, rank)
    pieces = [Piece.of(port, program.mesh, rank) for port in program.inputs]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        given = [torch.empty(piece.shape, dtype=piece.dtype) for piece in pieces]  # kept: a freed storage's place is taken again
        values: dict[int, Any] = dict(enumerate(given))
        inputs = {_storage(value) for value in given}
        held = peak = sum(value.untyped_storage().nbytes() for value in given)
        holders: Counter[int] = Counter()
        stops = {segment.stop: segment.frees for segment in program.segments}
        for index, ins in enumerate(program.instructions):
            before = held
            for slot, value in run_fake(ins, values, site):
                values[slot] = value
                held += _taken(value, holders, inputs)
            peak = max(peak, held, before)
            for slot in (*ins.frees, *stops.get(index + 1, ())):
                held -= _given_back(values.pop(slot, None), holders, inputs)
    return peak


def _taken(value: Any, holders: Counter[int], inputs: set[int]) -> int:
    if not isinstance(value, torch.Tensor) or _storage(value) in inputs:
        return 0
    holders[_storage(value)] += 1
    return value.untyped_storage().nbytes() if holders[_storage(value)] == 1 else 0


def _given_back(value: Any, holders: Counter[int], inputs: set[int]) -> int:
    if not isinstance(value, torch.Tensor) or _storage(value) in inputs:
        return 0
    holders[_storage(value)] -= 1
    return 0 if holders[_storage(value)] else value.untyped_storage().nbytes()


def _storage(value: torch.Tensor) -> int:
    place: int = value.untyped_storage()._cdata
    return place
