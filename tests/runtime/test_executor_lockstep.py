import operator

import pytest
import torch
from hand_lowered import (
    ATEN,
    C10D,
    Builder,
    data_parallel_training,
    mlp_reference,
    tensor_parallel_mlp,
    uneven_windows,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hocket.compiler.emit import emit
from hocket.compiler.layout import coordinate
from hocket.runtime.errors import CollectiveMismatch, InputError, RankFailed
from hocket.runtime.executors.lockstep import LockstepExecutor, run_lockstep
from hocket.runtime.executors.strands import StrandExecutor
from hocket.runtime.matching import match_collectives
from hocket.runtime.pieces import assemble, cut
from hocket.runtime.program import RankProgram


def rows_of(program: RankProgram, values):
    pieces = [cut(value, port.layout, program.mesh) for value, port in zip(values, program.inputs, strict=True)]
    return [[p[rank] for p in pieces] for rank in range(program.mesh.size)]


def globals_of(program: RankProgram, rows):
    return [
        None if rows[0][i] is None else assemble([row[i] for row in rows], port.layout, program.mesh)
        for i, port in enumerate(program.outputs)
    ]


def run_all_ways(program: RankProgram, values, **options):
    """Global outputs of the shared pass, after checking that strands give the same bits on every rank."""
    rows = rows_of(program, values)
    together = run_lockstep(program, rows, **options)
    apart = StrandExecutor([program] * program.mesh.size, **options)
    frame = apart.open(rows)
    found = [[] for _ in rows]
    for segment in program.segments:
        extra = [[row[p] for p in segment.inputs] for row in rows]
        for mine, more in zip(found, apart.run(frame, segment.name, extra), strict=True):
            mine.extend(zip(program.segment_outputs(segment.name), more, strict=True))
    for one, two in zip(together, found, strict=True):
        for port, value in two:
            assert (value is None) == (one[port] is None)
            assert value is None or torch.equal(value, one[port])
    return globals_of(program, together)


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "dp=1,tp=2", "dp=4,tp=2", "dp=2,tp=4"])
def test_a_tensor_parallel_mlp_equals_a_single_device(mesh):
    torch.manual_seed(0)
    program = emit(tensor_parallel_mlp(mesh, rows=16))
    values = [torch.randn(port.shape, dtype=torch.float64) for port in program.inputs]
    found = run_all_ways(program, values, dtype=torch.float64)
    for one, two in zip(found, mlp_reference(*values), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_data_parallel_training_equals_autograd():
    torch.manual_seed(0)
    program = emit(data_parallel_training("dp=3", rows=7))
    x, w1, w2 = torch.randn(7, 4).double(), torch.randn(4, 4).double().requires_grad_(), torch.randn(4, 4).double().requires_grad_()
    seen, t = torch.tensor(4.0).double(), torch.randn(7, 4).double()
    y, g1, g2, gx, more = run_all_ways(program, [x, w1, w2, seen, t], dtype=torch.float64)
    wanted = torch.relu(x @ w1) @ w2
    d1, d2 = torch.autograd.grad(wanted, (w1, w2), t)
    assert gx is None
    assert more.item() == 5
    for one, two in ((y, wanted), (g1, d1), (g2, d2)):
        torch.testing.assert_close(one, two.detach(), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 11), st.integers(1, 6))
def test_uneven_chunks_are_the_whole_again(total, parts):
    program = emit(uneven_windows(f"tp={parts}", total))
    x = torch.randn(total, dtype=torch.float64)
    piece, count, length, gathered = run_all_ways(program, [x], dtype=torch.float64)
    assert torch.equal(piece, x)
    assert torch.equal(count, torch.arange(total))
    assert torch.equal(gathered, x)
    torch.testing.assert_close(length, x.sum())


def test_replicated_work_is_done_once_whatever_the_number_of_ranks():
    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    def calls(mesh: str) -> int:
        b = Builder(mesh)
        x = b.input("input", "x", (4, 4), "R")
        y = x
        for _ in range(5):
            y = b.op(ATEN.mm.default, y, x)
        b.output("output", "y", y, "R", (4, 4))
        program = emit(b.program())
        executor = LockstepExecutor(program)
        frame = executor.open(rows_of(program, [torch.randn(4, 4)]))
        with Count() as count:
            executor.run(frame, "forward")
        return count.calls

    assert calls("d=1") == calls("d=16")


def test_random_ops_are_not_shared_between_ranks():
    b = Builder("d=3")
    x = b.input("input", "x", (32,), "R")
    b.output("output", "y", b.op(ATEN.rand_like.default, x), "P(avg)", (32,))
    rows = run_lockstep(emit(b.program()), [[torch.zeros(32)]] * 3)
    assert not torch.equal(rows[0][0], rows[1][0])


def ring_program(size: int) -> RankProgram:
    """Every rank sends its vector to the next one and adds what it receives from the one before."""
    b = Builder(f"cp={size}")
    x = b.input("input", "x", (size * 2,), "S(0)")
    me = b.op(coordinate, "cp")
    after = b.op(operator.mod, b.op(operator.add, me, 1), size)
    before = b.op(operator.mod, b.op(operator.add, me, size - 1), size)
    b.op(C10D.isend.default, x, after, 0, "cp")
    got = b.collective(C10D.irecv.default, x, before, 0, "cp")
    b.output("output", "y", b.op(ATEN.add.Tensor, x, got), "S(0)", (size * 2,))
    return emit(b.program())


def test_a_ring_of_messages_in_one_shared_program():
    program = ring_program(4)
    match_collectives(program)
    x = torch.randn(8)
    (y,) = globals_of(program, run_lockstep(program, rows_of(program, [x])))
    assert torch.equal(y, x + x.roll(2))


def stage(index: int, *, swapped: bool = False, width: int = 4) -> RankProgram:
    """Two pipeline stages: stage 0 sends x @ w to stage 1, which returns its relu; both then sum a value."""
    b = Builder("pp=2")
    x = b.input("input", "x", (2, width), "R")
    w = b.input("param", "w", (width, width), "R")
    if index == 0:
        h = b.op(ATEN.mm.default, x, w)
        if swapped:
            back = b.collective(C10D.irecv.default, x, 1, 1, "pp")
            b.op(C10D.isend.default, b.op(ATEN.add.Tensor, h, back), 1, 0, "pp")
        else:
            b.op(C10D.isend.default, h, 1, 0, "pp")
            back = b.collective(C10D.irecv.default, x, 1, 1, "pp")
    else:
        h = b.collective(C10D.irecv.default, x, 0, 0, "pp")
        back = b.op(ATEN.relu.default, h)
        b.op(C10D.isend.default, back, 0, 1, "pp")
    total = b.collective(C10D.all_reduce.default, b.op(ATEN.sum.default, back), "sum", "pp")
    b.output("output", "y", back, "R", (2, width))
    b.output("output", "total", total, "R", ())
    return emit(b.program())


def test_stages_with_programs_of_their_own_equal_a_single_device():
    programs = [stage(0), stage(1)]
    match_collectives(programs)
    x, w = torch.randn(2, 4), torch.randn(4, 4)
    rows = run_lockstep(programs, [[x, w], [x, w]])
    expected = torch.relu(x @ w)
    for y, total in rows:
        assert torch.equal(y, expected)
        torch.testing.assert_close(total, 2 * expected.sum())


def test_stages_that_wait_for_each_other_are_refused_with_both_lines():
    programs = [stage(0, swapped=True), stage(1)]
    with pytest.raises(CollectiveMismatch, match=r"wait for each other.*rank 0 is at.*model\.py.*rank 1 is at.*model\.py"):
        match_collectives(programs)
    x, w = torch.randn(2, 4), torch.randn(4, 4)
    with pytest.raises(CollectiveMismatch, match=r"deadlock: rank 0 waits for .*irecv.*rank 1 waits for .*irecv"):
        run_lockstep(programs, [[x, w], [x, w]])


def reducing(*steps: tuple[str, str, tuple[int, ...]], mesh: str = "tp=2", dtype=torch.float32) -> RankProgram:
    """All-reduces of the given (op, axis, shape), one after another."""
    b = Builder(mesh)
    layout = ",".join(["R"] * len(b.mesh.axes))
    for i, (op, axis, shape) in enumerate(steps):
        x = b.input("input", f"x{i}", shape, layout, dtype)
        b.output("output", f"y{i}", b.collective(C10D.all_reduce.default, x, op, axis), layout, shape)
    return emit(b.program())


A, B = ("sum", "tp", (2,)), ("sum", "tp", (3,))
MISMATCHES = {
    "shape": (reducing(A), reducing(B)),
    "order": (reducing(A, B), reducing(B, A)),
    "reduction": (reducing(A), reducing(("max", "tp", (2,)))),
    "dtype": (reducing(A), reducing(A, dtype=torch.float64)),
    "a missing collective": (reducing(A, A), reducing(A)),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_programs_that_disagree_are_refused_before_and_while_running(name):
    programs = MISMATCHES[name]
    with pytest.raises(CollectiveMismatch, match=r"rank 0.*rank 1") as caught:
        match_collectives(programs)
    assert str(caught.value).count("model.py:") >= (1 if name == "a missing collective" else 2)
    rows = [[torch.ones(p.shape, dtype=getattr(torch, p.dtype)) for p in program.inputs] for program in programs]
    with pytest.raises(CollectiveMismatch):
        run_lockstep(programs, rows)


def test_groups_entered_in_different_orders_are_refused():
    first = reducing(("sum", "dp", (2,)), ("sum", "tp", (2,)), mesh="dp=2,tp=2")
    second = reducing(("sum", "tp", (2,)), ("sum", "dp", (2,)), mesh="dp=2,tp=2")
    with pytest.raises(CollectiveMismatch, match="wait for each other"):
        match_collectives([first, second, second, first])
    match_collectives([first] * 4)
    match_collectives(first)


def test_a_message_that_nobody_receives_is_refused():
    b = Builder("pp=2")
    x = b.input("input", "x", (2,), "R")
    b.op(C10D.isend.default, x, 1, 0, "pp")
    b.output("output", "x", x, "R", (2,))
    sender = emit(b.program())
    quiet = Builder("pp=2")
    x = quiet.input("input", "x", (2,), "R")
    quiet.output("output", "x", x, "R", (2,))
    with pytest.raises(CollectiveMismatch, match=r"never received.*rank 0.*model\.py:2"):
        match_collectives([sender, emit(quiet.program())])


def test_a_message_of_another_shape_is_refused():
    programs = [stage(0), stage(1, width=5)]
    with pytest.raises(CollectiveMismatch, match="sends"):
        match_collectives(programs)
    with pytest.raises(CollectiveMismatch):
        run_lockstep(programs, [[torch.ones(2, 4), torch.ones(4, 4)], [torch.ones(2, 5), torch.ones(5, 5)]])


def test_splits_that_do_not_fit_are_refused():
    b = Builder("tp=2")
    x = b.input("input", "x", (6,), "R")
    me = b.op(coordinate, "tp")
    wrong = [b.op(operator.add, me, 1), b.op(operator.add, me, 2)]
    y = b.collective(C10D.all_to_all_single.default, x, [3, 3], wrong, "tp")
    b.output("output", "y", y, "S(0)", (12,))
    b.results[-1].meta["val"] = torch.empty(6, device="meta")
    program = emit(b.program())
    with pytest.raises(CollectiveMismatch, match="splits"):
        match_collectives(program)
    with pytest.raises(CollectiveMismatch):
        run_lockstep(program, [[torch.ones(6)]] * 2)


def test_pieces_of_unequal_sizes_are_refused_by_all_reduce():
    b = Builder("tp=2")
    x = b.input("input", "x", (5,), "S(0)")
    b.output("output", "y", b.collective(C10D.all_reduce.default, x, "sum", "tp"), "S(0)", (5,))
    program = emit(b.program())
    with pytest.raises(CollectiveMismatch, match=r"ranks 0 and 1 disagree at .*all_reduce.*model\.py:2"):
        run_lockstep(program, rows_of(program, [torch.ones(5)]))


def test_a_failure_names_the_rank():
    program = emit(data_parallel_training("dp=2"))
    x, w, t = torch.randn(3, 4), torch.randn(4, 4), torch.randn(3, 4)
    seen = torch.tensor(0.0)
    with pytest.raises(RankFailed, match="rank 1 failed at instruction 0") as caught:
        run_lockstep(program, [[x, w, w, seen, t], [torch.randn(3, 5), w, w, seen, t]])
    assert caught.value.rank == 1


def test_a_wrong_number_of_ranks_or_programs_is_refused():
    program = emit(data_parallel_training("dp=2"))
    with pytest.raises(InputError):
        run_lockstep([program], [[]])
    with pytest.raises(InputError):
        run_lockstep(program, [[None] * 5])
    with pytest.raises(InputError):
        match_collectives([program] * 3)
