"""All hand-written programs and their bugs, and how to make programs of them that can be compared."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.fx as fx
from torch import Tensor

from ...compiler.layout import local_shape, parse_placement
from ...compiler.program import Program, Role, RoleKind
from ...compiler.verify.foreign import Ports, program_of
from ...compiler.verify.tracing import trace_function
from ...runtime.mesh import Mesh
from .experts import experts
from .pipeline import pipeline
from .ranks import AXIS, Handwritten, Ranks, Tensors
from .ring_attention import ring_attention
from .synced_norm import synced_norm
from .tensor_parallel import tensor_parallel

PROGRAMS: dict[str, Callable[[], Handwritten]] = {
    "tensor parallel": tensor_parallel,
    "ring attention": ring_attention,
    "pipeline": pipeline,
    "experts": experts,
    "synchronised batch norm": synced_norm,
}


def bugs() -> list[tuple[str, str]]:
    """Every (program, bug)."""
    return [(name, bug) for name, make in PROGRAMS.items() for bug in make().bugs]


def reference_program(written: Handwritten) -> Program:
    """The step in one process."""
    values = {name: _value(written, name, shape) for name, shape in written.shapes.items()}
    traced, outputs = _traced(written.reference, values)
    return program_of((traced,), _ports(values, outputs))


def lowered_program(written: Handwritten, bug: str = "", ranks: int = 2) -> Program:
    """The step on ranks, with one bug or none."""
    if bug and bug not in written.bugs:
        raise ValueError(f"expected a bug of {written.name} among {', '.join(written.bugs)}; found {bug!r}")
    mesh = Mesh(((AXIS, ranks),))
    graphs: list[fx.GraphModule] = []
    outputs: tuple[str, ...] = ()
    for rank in range(ranks):
        values = {name: _value(written, name, _local(written, name, mesh, rank)) for name in written.shapes}
        traced, outputs = _traced(functools.partial(written.step, Ranks(rank, ranks, bug)), values)
        graphs.append(traced)
    whole = {name: _value(written, name, shape) for name, shape in written.shapes.items()}
    return program_of(graphs, _ports(whole, outputs), mesh, written.layouts)


def _local(written: Handwritten, name: str, mesh: Mesh, rank: int) -> tuple[int, ...]:
    layout = (parse_placement(written.layouts.get(name, "R")),)
    return local_shape(written.shapes[name], layout, mesh, rank)


def _value(written: Handwritten, name: str, shape: tuple[int, ...]) -> Tensor:
    """Only shape and dtype matter."""
    kinds = {None: torch.float32, 2: torch.bool}
    return torch.ones(shape, dtype=kinds.get(written.integers.get(name), torch.int64))


def _traced(step: Callable[[Tensors], Tensors], values: Tensors) -> tuple[fx.GraphModule, tuple[str, ...]]:
    names: list[tuple[str, ...]] = []

    def flat(*tensors: Tensor) -> list[Tensor]:
        results = step(dict(zip(values, tensors, strict=True)))
        names.append(tuple(sorted(results)))
        return [results[name] for name in sorted(results)]

    traced = trace_function(flat, list(values.values()))
    return traced, names[-1]


def _ports(values: Tensors, outputs: tuple[str, ...]) -> Ports:
    return Ports(tuple(map(_role, values)), tuple(map(_role, outputs)), tuple(values.values()))


def _role(text: str) -> Role:
    kind, name = text.split(":", 1)
    return Role(RoleKind(kind), name)
