"""A lowered program, emitted and run by the runtime's own executor, computes what one device computes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.emit import emit
from hocket.compiler.verify.blame import relative_error
from hocket.compiler.verify.lockstep import run_global
from hocket.passes.shard import Shard
from hocket.runtime.executors.lockstep import run_lockstep
from hocket.runtime.mesh import Mesh
from hocket.runtime.pieces import assemble, cut
from hocket.testing.random_plans import context, random_inputs, random_plan


@pytest.mark.parametrize("mesh", ["a=2", "a=3", "a=2,b=2"])
def test_the_emitted_program_computes_the_same(mesh: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 5), nn.Softmax(-1))
    program = capture(model, (torch.randn(6, 7),))
    inputs = {role: value.float() for role, value in random_inputs(program, 1).items()}
    want = run_global(program, inputs).outputs
    for seed in range(3):
        lowered = Shard()(program, context(random_plan(program, Mesh.parse(mesh), random.Random(seed))))
        emitted = emit(lowered)
        pieces = [
            cut(inputs[role], port.layout, emitted.mesh)
            for role, port in zip(program.signature.inputs, emitted.inputs, strict=True)
        ]
        rows = run_lockstep(emitted, [[p[rank] for p in pieces] for rank in range(emitted.mesh.size)])
        for index, (role, port) in enumerate(zip(program.signature.outputs, emitted.outputs, strict=True)):
            found = assemble([row[index] for row in rows], port.layout, emitted.mesh)
            assert relative_error(want[role], found) < 1e-5, f"{role} under plan {seed}"
