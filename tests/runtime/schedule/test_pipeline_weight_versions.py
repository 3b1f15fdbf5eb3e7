"""Asynchronous pipelines compute exactly their recurrence: replayed micro-batch by micro-batch with plain PyTorch, bit by bit."""

import pytest
import torch
from pipelined_models import Case, Chain, batches
from torch import Tensor

from hocket.compiler.capture.optimizer import initial_state
from hocket.compiler.capture.step import capture_step
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.plan.pipeline.asynchronous import MODES, asynchronous, version
from hocket.compiler.plan.pipeline.stage_code import states_of
from hocket.compiler.program import Phase, RoleKind, note
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.stages import PartKind
from hocket.errors import InputError
from hocket.passes.backward_split import BackwardSplit
from hocket.passes.pipeline import cut_stages
from hocket.runtime.mesh import Mesh
from hocket.runtime.schedule.instruction import Op
from hocket.runtime.schedule.loopback import LoopbackPipeline
from hocket.runtime.schedule.stage import Port
from hocket.runtime.schedule.verify import verify_schedule

STAGES, COUNT, GROUP = 3, 8, 4
RATE, MOMENTUM = 0.05, 0.9


def groups(mode: str) -> int:
    return GROUP if mode == "2bw" else 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_schedules_keep_the_weights_that_each_micro_batch_must_see(mode: str, ranks: int) -> None:
    schedule = asynchronous(mode, ranks, 8, groups(mode))
    verify_schedule(schedule)
    for rank, row in enumerate(schedule.ranks):
        now, kept, seen = 0, dict[int, int](), list[int]()
        for instr in row:
            if instr.op is Op.OPT:
                now += 1
            elif instr.op is Op.STASH:
                kept[instr.micro_batch] = now
            elif instr.op is Op.F:
                seen.append(kept.get(instr.micro_batch, now))
        assert seen == [version(mode, rank, ranks, m, groups(mode)) for m in range(8)]


def captured() -> tuple[Case, dict[str, Tensor]]:
    torch.manual_seed(1)
    model = Chain(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM, foreach=False)
    program = capture_step(model, optimizer, batches(1)[0])
    split = BackwardSplit()(program, Context(Mesh.parse("d=1"), RuleTable(), Cluster.default()))
    calls = [n for n in split.nodes if n.op == "call_function" and note(n).phase is Phase.FORWARD]
    forward = {node.name: min(place * STAGES // len(calls), STAGES - 1) for place, node in enumerate(calls)}
    return Case(model, program, cut_stages(split, forward)), initial_state(model, optimizer)


def replay(made: Case, state: dict[str, Tensor], mode: str, data: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The recurrence itself: per parameter a list of weights, the newest last; the update rule is the captured one."""
    history = {name: [p.detach().clone()] for name, p in made.model.named_parameters()}
    rules = [part for stage in made.pipeline.stages for part in stage.of(PartKind.OPTIMIZER)]
    stage_of = {role.name: rule.stage for rule in rules for role in rule.program.signature.inputs if role.kind is RoleKind.PARAM}
    state = {name: value.clone() for name, value in state.items()}
    total: dict[str, Tensor] = {}
    for m, batch in enumerate(data):
        weights = {}
        for name, versions in history.items():
            weights[name] = versions[version(mode, stage_of[name], STAGES, m, groups(mode))].clone().requires_grad_()
        loss = torch.func.functional_call(made.model, weights, batch)
        gradients = torch.autograd.grad(loss, list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            total[name] = total[name] + gradient if name in total else gradient
        if (mode == "flush" and m < len(data) - 1) or (mode != "flush" and (m + 1) % groups(mode)):
            continue
        for rule in rules:
            known = {RoleKind.GRADIENT: total, RoleKind.STATE: state, RoleKind.PARAM: {n: v[-1] for n, v in history.items()}}
            known[RoleKind.CONSTANT] = dict(rule.program.constants)
            inputs = [known[role.kind][role.name] for role in rule.program.signature.inputs]
            with torch.no_grad():
                results = torch.fx.Interpreter(rule.program.graph).run(*inputs)
            for role, value in zip(rule.program.signature.outputs, results, strict=True):
                if role.name in history:
                    history[role.name].append(value)
                else:
                    state[role.name] = value
        total = {}
    return {name: versions[-1] for name, versions in history.items()}


def test_the_captured_update_rule_is_that_of_the_optimizer() -> None:
    """One update by the rule that the replays use, against torch's own."""
    made, state = captured()
    data = batches(2)
    found = replay(made, state, "flush", data)
    optimizer = torch.optim.SGD(made.model.parameters(), lr=RATE, momentum=MOMENTUM)
    made.accumulated(data)
    optimizer.step()
    for name, parameter in made.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach())


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_is_its_recurrence_to_the_last_bit(mode: str) -> None:
    made, state = captured()
    data = batches(COUNT)
    tensors = made.tensors() | {Port("state", name): value.clone() for name, value in state.items()}
    pipeline = LoopbackPipeline(asynchronous(mode, STAGES, COUNT, groups(mode)), states_of(made.pipeline, tensors))
    pipeline.step([made.given(batch) for batch in data])
    expected = replay(made, state, mode, data)
    found = {port.name: value for st in pipeline.states for port, value in st.held.items() if port.kind == "param"}
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{mode}: {name}"
    assert not any(st.kept for st in pipeline.states)


def test_groups_that_need_more_than_two_versions_are_refused() -> None:
    with pytest.raises(InputError, match="groups of at least 4 micro-batches that divide 8, found groups of 2"):
        asynchronous("2bw", 4, 8, 2)
    with pytest.raises(InputError, match="one of the weight versions flush, stash, vertical, 2bw; found 'later'"):
        asynchronous("later", 4, 8)
    with pytest.raises(InputError, match="groups are part of 2bw only"):
        asynchronous("stash", 4, 8, 2)
