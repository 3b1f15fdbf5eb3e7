"""Every schedule gives the gradients of micro-batches run one after the other, to the last bit, on any number of stages."""

import random
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from pipelined_models import Case, Chain, batches, cut
from torch import Tensor

from hocket.compiler.plan.pipeline.closed_forms import Order
from hocket.compiler.plan.pipeline.costs import PipelineCosts
from hocket.compiler.plan.pipeline.forms import FOLDED, NAMES, closed_form, inference, schedule_of
from hocket.compiler.plan.pipeline.listing import Habit, list_schedule
from hocket.compiler.plan.pipeline.problem import Problem, arrays
from hocket.compiler.plan.pipeline.stage_code import held_by, stage_codes
from hocket.errors import InputError, RankFailed
from hocket.runtime.inductor import missing_compiler
from hocket.runtime.schedule.instruction import Instr, Op, Schedule
from hocket.runtime.schedule.loopback import LoopbackPipeline
from hocket.runtime.schedule.stage import Part, Port, StageCode, StageState


@cache
def case(stages: int, norm: str = "layer") -> Case:
    torch.manual_seed(stages)
    return cut(Chain(max(2, stages), norm=norm), batches(1)[0], stages)


def run(schedule: Schedule, made: Case, data: Sequence[Sequence[Tensor]], *, products: bool = False) -> LoopbackPipeline:
    pipeline = LoopbackPipeline(schedule, made.states(products=products))
    losses = pipeline.step([made.given(batch) for batch in data])
    expected, _ = made.accumulated(data)
    for found, loss in zip(losses, expected, strict=True):
        torch.testing.assert_close(next(iter(found.values())), loss)
    assert not any(values for state in pipeline.states for values in state.values.values()), "a value is still held"
    return pipeline


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_gives_the_gradients_of_eager_pytorch(name: str) -> None:
    ranks = 2 if name in FOLDED or name == "interleaved" else 4
    made, data = case(4), batches(4)
    pipeline = run(closed_form(name, ranks, 4), made, data)
    assert_equal(pipeline.gradients(), made.accumulated(data)[1])


def test_a_second_step_starts_from_nothing() -> None:
    made, data = case(2), batches(3)
    pipeline = LoopbackPipeline(closed_form("zb-h1", 2, 3), made.states())
    for _ in range(2):
        pipeline.step([made.given(batch) for batch in data])
        assert_equal(pipeline.gradients(), made.accumulated(data)[1])


def test_sixteen_stages_on_eight_ranks() -> None:
    made, data = case(16), batches(16)
    pipeline = run(closed_form("zb-v", 8, 16), made, data)
    assert_equal(pipeline.gradients(), made.accumulated(data)[1])


def random_schedule(rng: random.Random, stages: int, micro_batches: int) -> Schedule:
    """Any placement, any costs: orders nobody would draw by hand."""
    ranks = rng.randint(1, stages)
    placement = (*range(ranks), *(rng.randrange(ranks) for _ in range(stages - ranks)))
    costs = PipelineCosts.uniform(stages, rng.random() + 0.1, rng.random() + 0.1, rng.random())
    problem = Problem(
        costs, tuple(rng.sample(placement, stages)), micro_batches, recomputed=frozenset(rng.sample(range(stages), 1))
    )
    habit = Habit(rng.random() < 0.5, rng.random() < 0.5, rng.random(), bias=())
    found = arrays(problem)
    return found.schedule(list_schedule(found, habit), "random")


def test_random_schedules_with_recomputation_give_the_same_bits() -> None:
    made, data = case(4), batches(5)
    expected = made.accumulated(data)[1]
    rng = random.Random(3)
    for _ in range(12):
        pipeline = run(random_schedule(rng, 4, 5), made, data)
        assert_equal(pipeline.gradients(), expected)


def test_batch_norm_sees_micro_batches_in_order_and_recomputation_does_not_count_twice() -> None:
    made, data = case(3, "batch"), batches(4)
    made.model.train()
    before = made.tensors()
    _, expected = made.accumulated(data)
    after = {name: b.clone() for name, b in made.model.named_buffers()}
    for port, tensor in before.items():
        if port.kind == "buffer":
            made.model.get_buffer(port.name).copy_(tensor)
    rng = random.Random(5)
    for schedule in (closed_form("1f1b", 3, 4), random_schedule(rng, 3, 4)):
        pipeline = LoopbackPipeline(schedule, made.states())
        pipeline.step([made.given(batch) for batch in data])
        assert_equal(pipeline.gradients(), expected)
        for state in pipeline.states:
            for port, tensor in state.held.items():
                if port.kind == "buffer":
                    assert torch.equal(tensor, after[port.name]), port.name


def test_gradients_added_as_products_are_the_same_in_every_schedule() -> None:
    """addmm_ may round differently from mm and add, so the reference is the plainest schedule; and it is near eager."""
    made, data = case(4), batches(4)
    plain = run(closed_form("naive", 4, 4), made, data, products=True).gradients()
    for name in ("1f1b", "zb-h1"):
        assert_equal(run(closed_form(name, 4, 4), made, data, products=True).gradients(), plain)
    for name, gradient in made.accumulated(data)[1].items():
        torch.testing.assert_close(plain[name], gradient)


def with_explicit_sums(schedule: Schedule) -> Schedule:
    """W in reverse order at the end, ACC in the right one."""
    ranks: Order = []
    for row in schedule.ranks:
        weights = [instr for instr in row if instr.op is Op.W]
        rest = [instr for instr in row if instr.op is not Op.W]
        added = [Instr(Op.ACC, w.stage, w.micro_batch, w.piece) for w in weights]
        ranks.append([*rest, *weights[::-1], *added])
    return schedule.with_ranks(ranks)


def test_gradients_may_be_made_in_any_order_where_they_are_added_in_the_right_one() -> None:
    made, data = case(2), batches(3)
    pipeline = run(with_explicit_sums(closed_form("gpipe-2bp", 2, 3)), made, data)
    assert_equal(pipeline.gradients(), made.accumulated(data)[1])


def test_forwards_only() -> None:
    made, data = case(3), batches(2)
    pipeline = LoopbackPipeline(inference(3, 2), made.states())
    losses = pipeline.step([made.given(batch) for batch in data])
    for found, loss in zip(losses, made.accumulated(data)[0], strict=True):
        torch.testing.assert_close(next(iter(found.values())), loss)


def double(stage: int, *, fail_at: float = float("inf")) -> StageCode:
    def run_part(arguments: Sequence[Tensor]) -> Sequence[Tensor]:
        if float(arguments[0][0]) >= fail_at:
            raise ValueError("too large for me")
        return [arguments[0] * 2]

    from hocket.runtime.schedule.stage import ValueSpec

    first, last = stage == 0, stage == 1
    spec = (ValueSpec("x", (2,), torch.float32, (1,)),)
    port_in = Port("input", "x") if first else Port("value", "x")
    port_out = Port("output", "y") if last else Port("value", "x")
    drops = () if first else ("x",)
    return StageCode(
        stage, Part(run_part, (port_in,), (port_out,), drops), receives=() if first else spec, sends=() if last else spec
    )


def test_an_error_in_a_part_names_rank_and_instruction() -> None:
    given = [{"x": torch.full((2,), float(m))} for m in range(4)]
    fine = LoopbackPipeline(inference(2, 4), [StageState(double(0), {}), StageState(double(1), {})])
    assert [float(out["y"][0]) for out in fine.step(given)] == [0, 4, 8, 12]
    bad = LoopbackPipeline(inference(2, 4), [StageState(double(0), {}), StageState(double(1, fail_at=4.0), {})])
    with pytest.raises(RankFailed, match="rank 1 failed in F s1 m2: too large for me"):
        bad.step(given)


@pytest.mark.parametrize("form", ["1f1b", "zb-h1"])
def test_a_first_stage_with_weight_gradients_alone_gets_them(form: str) -> None:
    """As an embedding: no gradient of its inputs, so no part I, but weights all the same."""
    x, w = Port("input", "x"), Port("param", "w")
    forward = Part(lambda a: [a[0] * a[1], a[0]], (x, w), (Port("output", "y"), Port("value", "kept")))
    weight = Part(lambda a: [a[0]], (Port("value", "kept"),), (Port("gradient", "w"),), ("kept",))
    state = StageState(StageCode(0, forward, weights=(weight,)), {w: torch.ones(2)})
    pipeline = LoopbackPipeline(closed_form(form, 1, 3), [state])
    pipeline.step([{"x": torch.full((2,), float(m))} for m in range(3)])
    assert pipeline.gradients()["w"].tolist() == [3.0, 3.0]
    assert not any(state.values.values())


def test_inputs_for_another_number_of_micro_batches_are_refused() -> None:
    made, data = case(2), batches(3)
    with pytest.raises(InputError, match="runs 4 micro-batches, found inputs for 3"):
        LoopbackPipeline(closed_form("1f1b", 2, 4), made.states()).step([made.given(batch) for batch in data])


def test_another_number_of_pieces_than_the_stage_has_is_refused() -> None:
    order = [[Instr(Op.F, 0), Instr(Op.I, 0), Instr(Op.W, 0, 0, 0), Instr(Op.W, 0, 0, 1)], [Instr(Op.F, 1), Instr(Op.B, 1)]]
    with pytest.raises(InputError, match="stage 0: the schedule runs 2 pieces of its weight gradient, it has 1"):
        LoopbackPipeline(schedule_of(order, (0, 1), 1, name="pieces"), case(2).states())


@pytest.mark.slow
def test_parts_compiled_by_inductor_compute_the_same() -> None:
    if missing_compiler():
        pytest.skip(missing_compiler())
    made, data = case(2), batches(2)
    tensors = made.tensors()
    codes = stage_codes(made.pipeline, products=True, inductor=True)
    states = [StageState(code, held_by(stage, tensors)) for code, stage in zip(codes, made.pipeline.stages, strict=True)]
    pipeline = LoopbackPipeline(closed_form("zb-h1", 2, 2), states)
    losses = pipeline.step([made.given(batch) for batch in data])
    expected, gradients = made.accumulated(data)
    for found, loss in zip(losses, expected, strict=True):
        torch.testing.assert_close(next(iter(found.values())), loss)
    for name, gradient in pipeline.gradients().items():
        torch.testing.assert_close(gradient, gradients[name])
