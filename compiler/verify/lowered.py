"""Programs that are lowered already when a pass begins: what has to be made of them before they can be compared.

A level that executes draws whole inputs. The inputs of a lowered program carry the value of rank 0's piece, so they are given back
the whole one (``Note.global_shapes``); how it lies over the ranks stays in the layout.
"""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..program import Program, copy_program, note


def with_whole_inputs(program: Program) -> Program:
    """The program with the global value on every input; itself where it is logical, or its inputs are whole already."""
    if program.mesh is None:
        return program
    wanted = {}
    for node in program.placeholders:
        shapes, value = note(node).global_shapes, node.meta["val"]
        if isinstance(value, torch.Tensor) and shapes is not None and shapes[0] is not None and tuple(value.shape) != shapes[0]:
            wanted[node] = shapes[0]
    if not wanted:
        return program
    new, mapping = copy_program(program)
    with FakeTensorMode():
        for node, shape in wanted.items():
            value = node.meta["val"]
            mapping[node].meta["val"] = torch.empty(shape, dtype=value.dtype, device=value.device)
    return new
