"""What every slot of a program holds on one rank: sizes, strides, dtype and device, found without running anything.

Instructions run on fake tensors; the result of a collective follows from its input and the size of its group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensorMode

from .executors.tile_whole import forms_of_loop
from .instruction import Instruction
from .ops import COLLECTIVES, WAIT, overload_of
from .program import RankProgram
from .templates import Site, fold
from .tile_loop import TILE_LOOP, read_tile_loop


class Form(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: torch.Tensor) -> Form:
        """The form of a tensor."""
        return cls(tuple(value.shape), tuple(value.stride()), value.dtype, value.device)

    def empty(self) -> torch.Tensor:
        """A tensor of this form, its values undefined."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def forms(program: RankProgram, site: Site, inputs: Mapping[int, Form]) -> dict[int, Form]:
    """slot -> form, for every slot that holds a tensor. inputs: the forms of the input ports.

    Raises whatever an op's fake implementation raises where it has none.
    """
    values: dict[int, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for slot, form in inputs.items():
            values[slot] = form.empty()
        for ins in program.instructions:
            values.update(run_fake(ins, values, site))
    return {slot: Form.of(value) for slot, value in values.items() if isinstance(value, torch.Tensor)}


def run_fake(ins: Instruction, values: Mapping[int, Any], site: Site) -> list[tuple[int, Any]]:
    """(slot, value) of what an instruction writes. values: fake tensors by slot; runs under the caller's FakeTensorMode."""
    result = _run(ins, values, site)
    if not ins.spread:
        return [(ins.outputs[0], result)]
    return [(slot, element) for slot, element in zip(ins.outputs, result, strict=True) if slot >= 0]


def filled(template: Any, values: Mapping[int, Any], site: Site) -> Any:
    """An argument with the values of its slots."""
    if isinstance(template, dict) and "slot" in template:
        return values[template["slot"]]
    if isinstance(template, list):
        return [filled(item, values, site) for item in template]
    return fold(template, site)


def _run(ins: Instruction, values: Mapping[int, Any], site: Site) -> Any:
    if ins.op == WAIT:
        return filled(ins.args[0], values, site)
    if ins.op == TILE_LOOP:
        operands, *words = ins.args
        return forms_of_loop(read_tile_loop(*words), site, filled(operands, values, site))
    args = [filled(template, values, site) for template in ins.args]
    if ins.op in COLLECTIVES:
        return _collective(ins.op, args, site)
    return overload_of(ins.op)(*args, **{name: filled(t, values, site) for name, t in ins.kwargs.items()})


def _collective(op: str, args: list[Any], site: Site) -> torch.Tensor:
    """The result of a collective, contiguous as communicators return it."""
    shape = COLLECTIVES[op]
    value: torch.Tensor = args[0]
    if shape.method in ("send", "recv"):
        return value
    sizes = list(value.shape)
    parts = site.mesh.axis_size(args[shape.axis])
    match shape.method:
        case "all_gather":
            sizes[0] *= parts
        case "reduce_scatter":
            sizes[0] //= parts
        case "all_to_all":
            sizes[0] = sum(args[1])
    return value.new_empty(sizes)
