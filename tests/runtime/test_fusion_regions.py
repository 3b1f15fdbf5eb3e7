"""Regions between collectives: where the list is cut, and that running a region as one call changes nothing."""

import json

import hypothesis
import pytest
import torch
from hand_lowered import ATEN, Builder, tensor_parallel_mlp
from torch._inductor import config

from hocket.compiler.emit import emit
from hocket.runtime import fusion, inductor
from hocket.runtime.communicator import SingleCommunicator
from hocket.runtime.errors import RankFailed
from hocket.runtime.executors.flat import FlatExecutor
from hocket.runtime.fusion import Fusion, input_forms
from hocket.runtime.load import load
from hocket.runtime.program import RankProgram
from hocket.runtime.regions import Report, is_boundary, regions, summary
from hocket.runtime.shapes import Form, forms
from hocket.runtime.templates import slots_in
from hocket.testing.strategies import programs


def fused(program: RankProgram, inputs) -> tuple[FlatExecutor, Fusion]:
    loaded = load(program, 0)
    made = Fusion(loaded, {i: Form.of(value) for i, value in enumerate(inputs)}, lambda _: None)
    return FlatExecutor(loaded, SingleCommunicator(), None, made.steps), made


def plain(program: RankProgram) -> FlatExecutor:
    return FlatExecutor(load(program, 0), SingleCommunicator())


def run(executor: FlatExecutor, inputs) -> list[torch.Tensor | None]:
    program, found = executor.program, []
    frame = executor.open(inputs)
    for segment in program.segments:
        first = segment is program.segments[0]
        found += executor.run(frame, segment.name, () if first else [inputs[port] for port in segment.inputs])
    return found


@pytest.fixture
def no_compiling(monkeypatch):
    """Regions run as the graphs that Inductor would be given."""
    monkeypatch.setattr(fusion, "missing_compiler", str)
    monkeypatch.setattr(fusion, "compile_graph", lambda graph, _: graph)


def blocks(depth: int = 3) -> RankProgram:
    """The same block ``depth`` times: relu(x @ w) + x; one rank, an all_reduce after every block."""
    b = Builder("d=1")
    x = b.input("input", "x", (4, 6), "R")
    w = b.input("param", "w", (6, 6), "R")
    for _ in range(depth):
        x = b.op(ATEN.add.Tensor, b.op(ATEN.relu.default, b.op(ATEN.mm.default, x, w)), x)
        x = b.collective(torch.ops._c10d_functional.all_reduce.default, x, "sum", "d")
    b.output("output", "y", x, "R", (4, 6))
    return emit(b.program())


def test_the_cuts_of_a_tensor_parallel_mlp():
    program = emit(tensor_parallel_mlp())
    found = [[program.instructions[i].op for i in range(r.start, r.stop)] for r in regions(program)]
    assert found == [["aten.mm.default", "aten.gelu.default", "aten.mm.default"]]
    (region,) = regions(program)
    assert (region.start, region.stop, region.inputs) == (0, 3, (0, 1, 2))
    assert region.outputs == program.instructions[2].outputs  # what lies between is the region's own


def test_repeated_blocks_are_compiled_once(no_compiling):
    program, inputs = blocks(), [torch.randn(4, 6), torch.randn(6, 6)]
    executor, made = fused(program, inputs)
    assert (made.report.regions, made.report.compiled, made.report.distinct, made.report.fused) == (3, 3, 1, 9)
    assert torch.equal(run(executor, inputs)[0], run(plain(program), inputs)[0])


@hypothesis.given(program=programs(most_layers=3))
@hypothesis.settings(max_examples=12, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_running_regions_as_one_call_changes_nothing(no_compiling, program):
    emitted = emit(program)
    inputs = [torch.rand(port.shape) + 0.5 for port in emitted.inputs]
    executor, made = fused(emitted, inputs)
    assert not made.report.failures
    for before, after in zip(run(plain(emitted), inputs), run(executor, inputs), strict=True):
        assert (before is None and after is None) or torch.equal(before, after)
    for region in regions(emitted):
        inside = emitted.instructions[region.start : region.stop]
        assert not any(map(is_boundary, inside))
        read = {slot for ins in inside for slot in slots_in((*ins.args, *ins.kwargs.values()))}
        assert set(region.inputs) == read - {slot for ins in inside for slot in ins.outputs}


def test_forms_are_what_running_gives():
    program = blocks()
    inputs = {0: torch.randn(6, 4).t(), 1: torch.randn(6, 6)}
    loaded = load(program, 0)
    known = forms(program, loaded.site, {i: Form.of(value) for i, value in inputs.items()})
    executor = plain(program)
    frame = executor.open([inputs[0], inputs[1]])
    executor.run(frame, "forward")
    assert known[program.segments[0].results[0][1]] == Form.of(run(executor, [inputs[0], inputs[1]])[0])


def test_without_a_compiler_the_report_says_so_and_the_program_runs():
    program, inputs = blocks(), [torch.randn(4, 6), torch.randn(6, 6)]
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        executor, made = fused(program, inputs)
    assert made.report.compiled == 0
    assert "no C++ compiler works here" in str(made.report)
    assert torch.equal(run(executor, inputs)[0], run(plain(program), inputs)[0])


def test_a_region_that_does_not_compile_names_the_source_line(monkeypatch, no_compiling):
    def refuse(*_):
        raise NotImplementedError("no kernel for this")

    monkeypatch.setattr(fusion, "compile_graph", refuse)
    program, inputs = blocks(1), [torch.randn(4, 6), torch.randn(6, 6)]
    executor, made = fused(program, inputs)
    assert made.report.failures == [("model.py:3 mm_default", "NotImplementedError: no kernel for this")]
    assert torch.equal(run(executor, inputs)[0], run(plain(program), inputs)[0])


def test_a_fault_inside_a_region_names_the_instruction_and_its_line(no_compiling):
    b = Builder("d=1")
    x, index = b.input("input", "x", (4, 6), "R"), b.input("input", "index", (2,), "R", torch.int64)
    y = b.op(ATEN.index_select.default, b.op(ATEN.mul.Tensor, x, 2), 0, index)
    b.output("output", "y", b.op(ATEN.relu.default, y), "R", (2, 6))
    program = emit(b.program())
    good, bad = torch.tensor([0, 3]), torch.tensor([0, 7])
    executor, made = fused(program, [torch.randn(4, 6), good])
    assert made.report.compiled == 1
    with pytest.raises(RankFailed, match=r"instruction 1: .*index_select") as caught:
        run(executor, [torch.randn(4, 6), bad])
    assert caught.value.source == "model.py:4 index_select_default"


def test_a_value_with_other_strides_is_brought_into_the_expected_ones(monkeypatch, no_compiling):
    def strict(graph, expected):
        def kernel(*values):
            assert [v.stride() for v in values] == [form.stride for form in expected]
            return graph(*values)

        return kernel

    monkeypatch.setattr(fusion, "compile_graph", strict)
    program, inputs = blocks(1), [torch.randn(4, 6), torch.randn(6, 6)]
    executor, made = fused(program, inputs)
    turned = [torch.randn(6, 4).t(), inputs[1]]
    assert torch.equal(run(executor, turned)[0], run(plain(program), turned)[0])
    assert all(call.kernel is not None for call in made.calls.values())


def test_inductor_agrees_with_eager_within_rounding():
    if missing := inductor.missing_compiler():
        pytest.skip(missing)
    program, inputs = blocks(2), [torch.randn(4, 6), torch.randn(6, 6)]
    executor, made = fused(program, inputs)
    assert (made.report.compiled, made.report.distinct) == (2, 1)
    torch.testing.assert_close(run(executor, inputs)[0], run(plain(program), inputs)[0], rtol=1e-5, atol=1e-6)


def test_ports_of_a_rank_have_the_forms_of_its_pieces():
    found = input_forms(emit(tensor_parallel_mlp()), 3, {}, torch.device("cpu"))
    assert found[0].shape == (4, 4)
    assert (found[1].shape, found[1].stride) == ((4, 4), (8, 1))  # a column piece is read in place


def test_reports_of_ranks_are_summed_up_by_the_least_compiled():
    good, bad = Report(9, 2, 2, 8, 1), Report(9, 2, 1, 4, 1, [("model.py:3", "why")])
    found = summary([json.dumps(report.to_json()).encode() for report in (good, bad)])
    assert found is not None
    assert (found.compiled, found.failures) == (1, [("model.py:3", "why")])
    assert summary([b"", b""]) is None
