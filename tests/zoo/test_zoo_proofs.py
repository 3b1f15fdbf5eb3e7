"""Every model of the zoo, cut in several ways, is proven: no false alarm, and no op without a meaning but the complex ones."""

from __future__ import annotations

import functools

import pytest
import torch
from zoo_check import FREE
from zoo_models import CASES

from hocket.compiler.capture import capture
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.doors.hall import Options, compile_program
from hocket.compiler.plan.tactics import TensorParallel, Zero
from hocket.compiler.program import Program
from hocket.compiler.retrace import Retrace
from hocket.compiler.verify.report import Outcome, Status, Verdict
from hocket.compiler.verify.ring.table import supported
from hocket.runtime.mesh import Mesh

MESHES = {"d=2": "auto", "tp=4": [TensorParallel("tp")], "dp=2,tp=2": [Zero("dp"), TensorParallel("tp")]}
COMPLEX = {"complex_rotary", "fourier_mixing"}
"""Complex numbers have no exact meaning: these are compared in floating point, and said to be."""
QUICK = {
    ("group_and_instance_norm", "d=2"),
    ("causal_grouped_attention", "tp=4"),
    ("embedding_bag", "d=2"),
    ("complex_rotary", "d=2"),
}
PAIRS = [(name, mesh) for name in CASES for mesh in MESHES]


def _verdicts(name: str, mesh: str) -> list[Verdict]:
    model, args, kwargs = CASES[name].make()
    cluster = FREE if MESHES[mesh] == "auto" else Cluster.default()
    options = Options(mesh=Mesh.parse(mesh), tactics=MESHES[mesh], level="ring", cluster=cluster)
    compiled = compile_program(_program(name), options, retrace=Retrace(model, args, kwargs))
    return [record.verdict for record in compiled.records]


@functools.lru_cache(maxsize=1)
def _program(name: str) -> Program:
    model, args, kwargs = CASES[name].make()
    return capture(model, args, kwargs)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "mesh"), [p if p in QUICK else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS])
def test_a_cut_model_is_proven(name: str, mesh: str) -> None:
    for verdict in _verdicts(name, mesh):
        assert verdict.status is Status.EQUAL, str(verdict)
        proved = {level.level for level in verdict.levels if level.outcome is Outcome.PROVED}
        assert proved == ({"float"} if name in COMPLEX else {"ring"}), str(verdict)


def _unsupported(name: str) -> set[str]:
    """Ops on floating point values that the ring does not know, forward and backward."""
    found = set()
    for node in _program(name).nodes:
        values = [m.meta.get("val") for m in (node, *node.all_input_nodes)]
        leaves = [leaf for value in values for leaf in (value if isinstance(value, (tuple, list)) else [value])]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        is_float = any(t.is_floating_point() for t in tensors) and not any(t.is_complex() for t in tensors)
        if is_float and isinstance(node.target, torch._ops.OpOverload) and not supported(node.target):
            found.add(str(node.target))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_op_of_a_public_model_has_a_meaning(name: str) -> None:
    assert not _unsupported(name)
