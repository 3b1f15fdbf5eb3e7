"""Schedules survive their text, and the exchange with torch's own format."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.pipelining.schedules as torch_schedules

from hocket.compiler.plan.pipeline.costs import PipelineCosts
from hocket.compiler.plan.pipeline.forms import NAMES, closed_form, cut_weights, inference
from hocket.runtime.schedule.instruction import COMPUTE, Instr, Op, Schedule, ScheduleError
from hocket.runtime.schedule.text import format_schedule, parse_schedule
from hocket.runtime.schedule.torch_csv import from_torch_csv, to_torch_csv
from hocket.runtime.schedule.verify import verify_schedule

GOLDEN = """\
schedule naive-2bp
placement 0 1
micro-batches 1
pieces 1 1
rank 0
  F s0 m0 cost 1.0 memory 1.0
  SEND activation s0 m0 to 1 tag 2
  RECV gradient s0 m0 from 1 tag 1
  I s0 m0 cost 0.1 memory -0.27
  W s0 m0 p0 cost 0.5 memory -0.73
rank 1
  RECV activation s1 m0 from 0 tag 2
  F s1 m0 cost 1.0 memory 1.0
  I s1 m0 cost 0.1 memory -0.27
  SEND gradient s1 m0 to 0 tag 1
  W s1 m0 p0 cost 0.5 memory -0.73
"""


def test_the_text_of_a_schedule() -> None:
    schedule = PipelineCosts.uniform(2, 1.0, 0.1, 0.5).applied(closed_form("naive-2bp", 2, 1))
    assert format_schedule(schedule) == GOLDEN


@pytest.mark.parametrize("name", NAMES)
def test_text_round_trip(name: str) -> None:
    schedule = closed_form(name, 3, 6)
    if all(piece == 1 for piece in schedule.pieces):
        schedule = cut_weights(schedule, [1 + stage % 3 for stage in range(schedule.stages)])
    weighted = Schedule(schedule.placement, 6, schedule.pieces, schedule.ranks, (0.1, 1 / 3, 1.0, 1.0, 0.5, 0.25), name, True)
    assert parse_schedule(format_schedule(weighted)) == weighted


def test_inference_and_weight_versions_round_trip() -> None:
    assert parse_schedule(format_schedule(inference(3, 4))) == inference(3, 4)
    row = tuple(Instr(op, 0, 1) for op in (Op.STASH, Op.F, Op.R, Op.B, Op.ACC, Op.REDUCE, Op.OPT, Op.DROP))
    schedule = Schedule((0,), 2, (1,), (row,))
    assert parse_schedule(format_schedule(schedule)) == schedule


@pytest.mark.parametrize(
    "line", ["F0", "F s0", "HALT s0 m0", "SEND s0 m0 to 1 tag 2", "F activation s0 m0", "RECV gradient s0 m0", "F s0 m0 cost x"]
)
def test_lines_that_are_no_instruction_are_refused(line: str) -> None:
    text = GOLDEN.replace("  F s0 m0 cost 1.0 memory 1.0", line, 1)
    with pytest.raises(ScheduleError, match="line 6 of a schedule"):
        parse_schedule(text)


def test_a_header_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ScheduleError, match="needs the header line 'pieces'"):
        parse_schedule(GOLDEN.replace("pieces 1 1\n", ""))


def torch_order(csv_text: str, folder: Path) -> dict[int, list[torch_schedules._Action]]:
    """What torch's own loader reads from a file."""
    (folder / "schedule.csv").write_text(csv_text)
    reader = SimpleNamespace(pipeline_order={}, _validate_and_set_stage_mapping=lambda order: None)
    torch_schedules.PipelineScheduleMulti._load_csv(reader, str(folder / "schedule.csv"))  # type: ignore[arg-type]
    return reader.pipeline_order


@pytest.mark.parametrize("name", NAMES)
def test_torch_reads_our_orders(name: str, tmp_path: Path) -> None:
    schedule = closed_form(name, 2, 4)
    order = torch_order(to_torch_csv(schedule, communication=False), tmp_path)
    for rank in range(2):
        ours = [(i.stage, i.op.value, i.micro_batch) for i in schedule.ranks[rank] if i.op in COMPUTE]
        assert [(a.stage_index, a.computation_type.value, a.microbatch_index) for a in order[rank]] == ours


@pytest.mark.parametrize("name", NAMES)
def test_torch_s_simulator_runs_our_communication(name: str) -> None:
    """The whole list, communication included, runs to its end in torch's check for deadlocks."""
    schedule = closed_form(name, 2, 4)
    rows = to_torch_csv(schedule).splitlines()
    actions = {rank: [torch_schedules._Action.from_str(cell) for cell in row.split(",")] for rank, row in enumerate(rows)}
    torch_schedules._simulate_comms_compute(actions, lambda stage: schedule.placement[stage], schedule.stages)


@pytest.mark.parametrize("communication", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_csv_round_trip(name: str, communication: bool) -> None:
    schedule = closed_form(name, 3, 6)
    again = from_torch_csv(to_torch_csv(schedule, communication=communication), name=name)
    assert again == schedule
    verify_schedule(again)


@pytest.mark.parametrize("micro_batches", [4, 8, 12])
def test_torch_s_own_orders_can_be_read_and_are_ours(micro_batches: int) -> None:
    """ZBV and DualPipeV as torch makes them: OVERLAP_F_B cells, idle cells, full and split backwards."""
    ours = {"zb-v": torch_schedules.ScheduleZBVZeroBubble, "dualpipe-v": torch_schedules.ScheduleDualPipeV}
    for name, theirs in ours.items():
        rows = []
        for rank in range(2):
            shape = SimpleNamespace(pp_group_size=2, _n_microbatches=micro_batches, num_stages=4, n_local_stages=2)
            actions = theirs._calculate_single_rank_operations(shape, rank)  # type: ignore[arg-type]
            rows.append(",".join("" if action is None else str(action) for action in actions))
        assert from_torch_csv("\n".join(rows), name=name) == closed_form(name, 2, micro_batches)


def test_what_torch_cannot_run_is_refused() -> None:
    with pytest.raises(ScheduleError, match="no action for W s0 m0 p1"):
        to_torch_csv(cut_weights(closed_form("zb-h1", 2, 2), (2, 2)))


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ScheduleError, match="found '0X0'"):
        from_torch_csv("0F0,0X0\n")
    with pytest.raises(ScheduleError, match="stage 0 has actions on ranks 0 and 1"):
        from_torch_csv("0F0\n0B0\n")
