"""ZeRO on real ranks: the numbers of eager training, and the bytes of the paper on the wire (arXiv 1910.02054, section 7)."""

import copy

import pytest
import torch
from torch import Tensor, nn

import hocket
from hocket.compiler.doors.module import session_of
from hocket.compiler.layout import Replicate, Shard
from hocket.compiler.program import RoleKind

RANKS = 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.GELU(), nn.Linear(16, 6, bias=False))


def size_of(model: nn.Module) -> int:
    return sum(p.numel() * 4 for p in model.parameters())


def layouts(compiled: object, kind: RoleKind) -> set[tuple[object, ...]]:
    program, plan = compiled.program, compiled.plan  # type: ignore[attr-defined]
    tensors = [program.placeholders[i] for i in program.signature.inputs_of(kind).values()]
    return {plan.nodes[node.name].outputs[0] for node in tensors if node.meta["val"].ndim > 1}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_fused_step_cuts_the_optimizer_state_and_moves_what_data_parallelism_does(stage: int) -> None:
    model = net()
    eager = copy.deepcopy(model)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, eager))
    batches = [torch.randn(4, 8) for _ in range(3)]

    def loss(y: Tensor) -> Tensor:
        return y.square().mean()

    tactics = [hocket.Zero("d", stage=stage)]
    with hocket.train_step(model, f"d={RANKS}", ours, (batches[0],), loss=loss, tactics=tactics, verify="types") as step:
        assert all(isinstance(layout[0], Shard) for layout in layouts(step.compiled, RoleKind.STATE))
        assert layouts(step.compiled, RoleKind.PARAM) == {(Replicate(),)}
        engine = step.session.engine
        before = engine.wire()[0].total  # type: ignore[attr-defined]
        for x in batches:
            got = step(x)
            theirs.zero_grad()
            want = loss(eager(x))
            want.backward()
            theirs.step()
            torch.testing.assert_close(got, want.detach())
        sent = engine.wire()[0].total - before  # type: ignore[attr-defined]
    for mine, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    # gradients are scattered as they are summed, new parameters gathered: (p - 1) / p of them each; and the loss is all-reduced.
    # Stage 1 may also keep whole gradients where this machine all-reduces faster than it scatters: (p - 1) / p more.
    share = (RANKS - 1) / RANKS
    least = share * (2 * size_of(model) + 2 * 4)
    predicted = step.compiled.plan.cost.bytes_on_wire
    assert sent == len(batches) * predicted
    assert predicted == least if stage == 2 else least <= predicted <= least + share * size_of(model)


def test_stage_two_scatters_gradients_for_an_optimizer_outside() -> None:
    model = net()
    eager = copy.deepcopy(model)
    x = torch.randn(4, 8)
    with hocket.parallelize(model, f"d={RANKS}", (x,), tactics=[hocket.Zero("d", stage=2)], verify="types") as parallel:
        engine = session_of(parallel).engine
        before = engine.wire()[0].total  # type: ignore[attr-defined]
        parallel(x).square().mean().backward()
        sent = engine.wire()[0].total - before  # type: ignore[attr-defined]
        assert layouts(session_of(parallel).compiled, RoleKind.PARAM) == {(Replicate(),)}
    eager(x).square().mean().backward()
    for mine, other in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert sent == (RANKS - 1) / RANKS * size_of(model)  # the caller reads the pieces in place, so nothing is gathered


def test_stage_one_without_the_optimizer_in_the_program_is_refused() -> None:
    with pytest.raises(hocket.errors.PlanError, match=r"stage 1 cuts optimizer state.*hocket\.train_step"):
        hocket.parallelize(net(), f"d={RANKS}", (torch.randn(4, 8),), tactics=[hocket.Zero("d", stage=1)], engine="sim")
