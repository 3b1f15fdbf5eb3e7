"""The exact run on an engine: right engines pass bit for bit, and each thing an engine can get wrong is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hocket
from hocket.compiler.cli.main import main
from hocket.compiler.verify.canary import canary_level, with_integers
from hocket.compiler.verify.report import Outcome, Status
from hocket.runtime.engines.local import LocalEngine
from hocket.runtime.engines.sim import SimEngine
from hocket.runtime.program import RankProgram
from hocket.runtime.stand_in import define
from hocket.testing.models import lowered


@pytest.mark.parametrize("case", ["perceptron, ZeRO-3", "llama, data and tensor parallel", "convolution, data parallel"])
def test_a_right_engine_gives_every_result_exactly(case: str) -> None:
    _, program = lowered(case)
    found = canary_level(program, SimEngine(program.mesh))
    assert found.outcome is Outcome.PASSED, found.detail


def test_the_program_on_integers_keeps_its_nodes_and_collectives() -> None:
    _, program = lowered("llama, tensor parallel")
    integers = with_integers(program)
    assert [node.name for node in integers.nodes] == [node.name for node in program.nodes]
    names = [str(node.target) for node in program.nodes if "_c10d_functional" in str(node.target)]
    assert [str(node.target) for node in integers.nodes if "_c10d_functional" in str(node.target)] == names
    assert not any(
        value.is_floating_point() for node in integers.nodes for value in [node.meta.get("val")] if isinstance(value, torch.Tensor)
    )


class Stale(SimEngine):
    """Every backward runs on what the latest forward saved."""

    def forward(self, handle: Any, inputs: Any) -> Any:
        ticket, outputs = super().forward(handle, inputs)
        self.latest = ticket
        return ticket, outputs

    def backward(self, handle: Any, ticket: Any, tangents: Any) -> Any:
        kept, self.latest = self.latest, ticket
        return super().backward(handle, kept, tangents)


class Lossy(SimEngine):
    """The first all-reduce does nothing."""

    def load(self, program: RankProgram, bindings: Any) -> Any:
        place = next(i for i, ins in enumerate(program.instructions) if "all_reduce" in ins.op)
        source, *_ = program.instructions[place].args
        lost = program.instructions[place].calling("aten.clone.default", [source])
        instructions = (*program.instructions[:place], lost, *program.instructions[place + 1 :])
        wait = place + 1
        assert "wait_tensor" in instructions[wait].op
        kept = instructions[wait].calling("aten.clone.default", instructions[wait].args)
        instructions = (*instructions[:wait], kept, *instructions[wait + 1 :])
        collectives = tuple(one for one in program.collectives if one.instruction != place)
        changed = RankProgram(
            program.mesh,
            program.inputs,
            program.outputs,
            instructions,
            program.segments,
            program.locations,
            collectives,
            program.slots,
        )
        return super().load(changed, bindings)


class Late(SimEngine):
    """Results are those of the call before."""

    held: list[torch.Tensor | None] | None = None

    def forward(self, handle: Any, inputs: Any) -> Any:
        ticket, outputs = super().forward(handle, inputs)
        held, self.held = self.held, outputs
        return ticket, held or outputs


@pytest.mark.parametrize(("engine", "says"), [(Stale, "backward"), (Lossy, "differs"), (Late, "step 1, forward")])
def test_an_engine_that_is_stale_lossy_or_late_is_seen(engine: type[SimEngine], says: str) -> None:
    _, program = lowered("attention, tensor parallel")
    found = canary_level(program, engine(program.mesh))
    assert found.outcome is Outcome.FAILED
    assert found.failure is Status.DIFFERENT
    assert says in found.detail


def test_every_entry_of_a_stand_in_depends_on_every_entry_of_its_arguments() -> None:
    define()
    base = torch.arange(6)
    made = torch.ops.hocket.stand_in(values=[base], key=3, size=[2, 2], stride=[2, 1], kind=0)
    assert torch.equal(made, torch.ops.hocket.stand_in(values=[base.clone()], key=3, size=[2, 2], stride=[2, 1], kind=0))
    for place in range(6):
        other = base.clone()
        other[place] += 1
        changed = torch.ops.hocket.stand_in(values=[other], key=3, size=[2, 2], stride=[1, 2], kind=0)
        assert bool((changed != made).all())
        assert changed.stride() == (1, 2)
    swapped = base[[1, 0, 2, 3, 4, 5]]
    assert bool((torch.ops.hocket.stand_in(values=[swapped], key=3, size=[2, 2], stride=[2, 1], kind=0) != made).all())


def test_a_program_that_cannot_be_run_exactly_is_not_called_fine() -> None:
    program, _ = lowered("perceptron, data parallel")
    found = canary_level(program, SimEngine(hocket.Mesh.parse("dp=2")))
    assert found.outcome is Outcome.SKIPPED


HOOK = """
def install(worker):
    first = worker.communicator.all_reduce
    count = [0]
    def all_reduce(tensor, op, axis):
        count[0] += 1
        if worker.rank == 1 and count[0] == 2:
            tensor = tensor.clone()
            tensor.view(-1)[0] += 1
        return first(tensor, op, axis)
    worker.communicator.all_reduce = all_reduce
"""


def test_the_local_engine_runs_a_step_exactly_and_one_wrong_bit_on_the_wire_is_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    mesh = hocket.Mesh.parse("tp=2")
    hook = tmp_path / "wire.py"
    hook.write_text(HOOK)
    with LocalEngine(mesh, threads=1) as right, LocalEngine(mesh, threads=1, rank_hook=hook) as wrong:
        parallel = hocket.parallelize(model, mesh, (torch.randn(4, 4),), tactics=[hocket.TensorParallel("tp")], engine=right)
        verdict = parallel.verify(canary=True)
        assert verdict.status is Status.EQUAL
        assert any(level.level == "canary" and level.outcome is Outcome.PASSED for level in verdict.levels), str(verdict)
        compiled = parallel.__dict__["_hocket_session"].compiled
        assert canary_level(compiled.lowered, wrong).outcome is Outcome.FAILED
        y = parallel(torch.randn(4, 4))  # the engine is as it was
        assert y.shape == (4, 4)


MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))
"""


def test_the_command_line_runs_the_canary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "canary_model.py"
    path.write_text(MODEL)
    code = main(["verify", f"{path}:Net", "--input", "64x8", "--mesh", "tp=2", "--level", "ring", "--canary", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [level["level"] for level in facts["verdicts"][-1]["levels"]][-1] == "canary"
    assert facts["verdicts"][-1]["levels"][-1]["outcome"] == "passed"
