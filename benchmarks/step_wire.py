"""Claim 3: bytes that real ranks put on the wire, counted by their communicators, equal the plan's formula."""

from __future__ import annotations

from fractions import Fraction

from common import Row, equal, progress
from step_model import Case

import hocket
from hocket.compiler.doors.module import session_of
from hocket.compiler.plan.tactics import DataParallel, SequenceParallel, Tactic, TensorParallel, Zero
from hocket.runtime.engines.local import LocalEngine
from hocket.runtime.mesh import Mesh

CLAIM = "bytes on the wire of a step, per rank"
CASE = Case(width=64, hidden=128, layers=2, batch=8, length=16)
PLANS: dict[str, tuple[str, tuple[Tactic, ...]]] = {
    "data parallel": ("d=4", (DataParallel("d"),)),
    "tensor parallel": ("d=4", (TensorParallel("d"),)),
    "ZeRO stage 3": ("d=4", (Zero("d", stage=3),)),
    "Megatron sequence parallel": ("d=4", (SequenceParallel("d"),)),
    "data x tensor parallel": ("dp=2,tp=2", (DataParallel("dp"), TensorParallel("tp"))),
}


def rows() -> list[Row]:
    """One forward and backward under every plan, on four real ranks."""
    found = []
    for name, (mesh, tactics) in PLANS.items():
        progress(f"wire: {name} on {mesh}")
        sent, formula = measure(mesh, tactics)
        odd = [total for total in sent if total != formula]
        found.append(equal(CLAIM, f"{name}, {mesh}", float(odd[0] if odd else sent[0]), "bytes", float(formula), "formula"))
    return found


def measure(mesh: str, tactics: tuple[Tactic, ...]) -> tuple[list[Fraction], Fraction]:
    """Bytes that each rank sent in a step, and what the plan says."""
    shape = Mesh.parse(mesh)
    with (
        LocalEngine(shape, threads=1) as engine,
        hocket.parallelize(CASE.model(), shape, CASE.data(), tactics=tactics, engine=engine) as parallel,
    ):
        before = [wire.total for wire in engine.wire()]
        parallel(*CASE.data()).backward()
        sent = [wire.total - earlier for wire, earlier in zip(engine.wire(), before, strict=True)]
        formula = Fraction(session_of(parallel).compiled.plan.cost.bytes_on_wire)
    return sent, formula
