"""Runs a zoo case through hocket and beside an eager copy, and compares everything that comes out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from zoo_case import Case

import hocket
from hocket.compiler.cost.cluster import COLLECTIVES, Cluster, Line
from hocket.compiler.doors.engines import engine_opener
from hocket.compiler.doors.hall import Options
from hocket.compiler.doors.module import parallel_view
from hocket.compiler.doors.session import Session
from hocket.compiler.doors.state import WholeState
from hocket.compiler.layout import Replicate
from hocket.compiler.plan.plan import Plan
from hocket.compiler.plan.tactics import Tactic
from hocket.runtime.mesh import Mesh

FLOOR = 1e-3
"""A gradient is compared relative to its own largest element, or to this share of the largest of all gradients: what is zero in
exact arithmetic (the gradient of a key's bias, or of a bias before a batch norm) is pure rounding."""

FREE = Cluster(
    device="cpu",
    flops={"float32": 1e6},
    memory_bandwidth=1e6,
    op_overhead=0.0,
    collectives=dict.fromkeys(COLLECTIVES, Line(1e-9, 1e-12)),
)
"""Slow ranks on a network that costs next to nothing: whatever can be cut is cut."""


def parallel(model: nn.Module, mesh: str, engine: str, tactics: Sequence[Tactic] | str) -> nn.Module:
    """``hocket.parallelize``; automatic axes believe in a free network."""
    if tactics != "auto":
        return hocket.parallelize(model, mesh, tactics=tactics, engine=engine, verify="off")
    shape = Mesh.parse(mesh)
    options = Options(shape, cluster=FREE, level="off")
    return parallel_view(model, Session(WholeState(model), engine_opener(engine, shape), options))


def assert_like_eager(case: Case, mesh: str, engine: str, tactics: Sequence[Tactic] | str) -> Plan:
    """Outputs, loss, the gradient of every parameter and input, and every buffer of one step. Returns the plan."""
    model, args, kwargs = case.make()
    m = parallel(model, mesh, engine, tactics)
    try:
        found = _step(m, args, kwargs)
        plan = m.plan
    finally:
        m.close()
    model, args, kwargs = case.make()
    if case.random:
        with parallel(model, "d=1", "sim", "auto") as reference:
            expected = _step(reference, args, kwargs)
    else:
        expected = _step(copy.deepcopy(model), args, kwargs)
    compare(found, expected, case.tolerance)
    return plan


def compare(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """AssertionError naming the first thing that differs."""
    assert list(found) == list(expected)
    gradients = [_size(value) for name, value in expected.items() if name.startswith("gradient")]
    floor = FLOOR * max(gradients, default=0.0)
    for name, want in expected.items():
        got = found[name]
        if not isinstance(want, Tensor) or not isinstance(got, Tensor):
            assert type(got) is type(want), f"{name}: {got!r} instead of {want!r}"
            assert got == want, f"{name}: {got!r} instead of {want!r}"
            continue
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        if not (want.is_floating_point() or want.is_complex()):
            assert torch.equal(got, want), name
            continue
        finite = want.isfinite()
        assert torch.equal(got[~finite], want[~finite]), f"{name}: infinite elsewhere"
        got, want = got[finite], want[finite]
        scale = max(_size(want), floor if name.startswith("gradient") else 0.0, 1e-30)
        kind = torch.complex128 if want.is_complex() else torch.float64
        error = _size(got.to(kind) - want.to(kind)) / scale
        assert error <= tolerance, f"{name}: off by {error:.1e} of its largest element {scale:.1e}"


def is_cut(plan: Plan) -> bool:
    """Whether some rank computes less than everything."""
    return any(
        placement is not None and not all(isinstance(p, Replicate) for p in placement)
        for node in plan.nodes.values()
        for placement in node.outputs
    )


def _step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """One forward and backward: everything there is to see, by name."""
    torch.manual_seed(7)
    result = model(*args, **kwargs)
    leaves = [leaf for leaf in _leaves((*args, *kwargs.values())) if isinstance(leaf, Tensor)]
    outputs = _leaves(result)
    seen: dict[str, Any] = {f"output {i}": v.detach().clone() if isinstance(v, Tensor) else v for i, v in enumerate(outputs)}
    generator = torch.Generator().manual_seed(11)
    loss = torch.zeros((), dtype=torch.float64)
    for value in outputs:
        if isinstance(value, Tensor) and value.requires_grad:
            real = torch.view_as_real(value) if value.is_complex() else value
            weight = torch.randn(real.shape, generator=generator, dtype=torch.float64)
            loss = loss + (real.double() * weight).square().mean()
    loss.backward()
    seen["loss"] = loss.detach()
    seen |= {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    seen |= {f"gradient of input {i}": t.grad for i, t in enumerate(leaves) if t.requires_grad and t.is_leaf}
    seen |= {f"buffer {name}": b.detach().clone() for name, b in model.named_buffers()}
    seen |= {f"input {i}": t.detach().clone() for i, t in enumerate(leaves)}
    return seen


def _leaves(value: Any) -> list[Any]:
    """Leaves of a tree in which dataclasses may stand, whether pytree knows them or not."""
    if dataclasses.is_dataclass(value) and not isinstance(value, dict):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return pytree.tree_leaves(value)


def _size(value: object) -> float:
    return float(value.detach().abs().max()) if isinstance(value, Tensor) and value.numel() else 0.0
