import gc
import operator
import weakref

import pytest
import torch
import torch.fx as fx
from hand_lowered import ATEN, Builder, data_parallel_training
from torch.utils._python_dispatch import TorchDispatchMode

from hocket.compiler.emit import emit
from hocket.runtime.communicator import SingleCommunicator
from hocket.runtime.errors import InputError, RankFailed
from hocket.runtime.executors.flat import FlatExecutor
from hocket.runtime.load import load
from hocket.runtime.program import RankProgram


def executor_of(program, **options) -> FlatExecutor:
    return FlatExecutor(load(RankProgram.from_json(emit(program).to_json()), 0, **options), SingleCommunicator())


def mixed_program():
    """Multi-output ops, lists of slots, keywords, scalars of every kind, an unused output, an input that is an output, a None."""
    b = Builder("d=1")
    x, w = b.input("input", "x", (4, 6), "R"), b.input("param", "w", (6,), "R")
    norm = b.op(ATEN.native_layer_norm.default, x, [6], w, None, 1e-5)
    normed = b.op(operator.getitem, norm, 0)
    rstd = b.op(operator.getitem, norm, 2)
    thirds = b.op(ATEN.split.Tensor, normed, 2, 1)
    joined = b.op(ATEN.cat.default, [b.op(operator.getitem, thirds, -1), b.op(operator.getitem, thirds, 0)], 1)
    stacked = b.op(ATEN.cat.default, thirds, -1)
    indexed = b.op(ATEN.index.Tensor, stacked, [None, b.op(ATEN.arange.default, 6, device=torch.device("cpu"), pin_memory=False)])
    halved = b.op(ATEN._to_copy.default, indexed, dtype=torch.float64)
    clamped = b.op(ATEN.clamp.default, joined, min=-0.5)
    for name, node in (("a", clamped), ("b", halved), ("c", rstd), ("d", x)):
        b.output("output", name, node, "R", tuple(node.meta["val"].shape))
    b.output("gradient", "none", None)
    return b.program().replace(mesh=None)


def test_results_equal_the_fx_interpreter_bitwise():
    program = mixed_program()
    x, w = torch.randn(4, 6), torch.randn(6)
    expected = fx.Interpreter(program.graph).run(x, w)
    executor = executor_of(program)
    frame = executor.open([x, w])
    found = executor.run(frame, "step")
    assert found[4] is None
    for value, wanted in zip(found[:4], expected[:4], strict=True):
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted)


def test_negative_zero_and_zero_are_different_constants():
    b = Builder("d=1")
    x = b.input("input", "x", (1,), "R")
    b.output("output", "a", b.op(ATEN.full_like.default, x, 0.0), "R", (1,))
    b.output("output", "b", b.op(ATEN.full_like.default, x, -0.0), "R", (1,))
    executor = executor_of(b.program())
    plus, minus = executor.run(executor.open([torch.ones(1)]), "forward")
    assert torch.signbit(minus).item()
    assert not torch.signbit(plus).item()


def test_true_and_one_are_different_constants():
    b = Builder("d=1")
    x = b.input("input", "x", (2,), "R")
    b.output("output", "a", b.op(ATEN.full.default, [1], 1, dtype=torch.int64), "R", (1,))
    b.output("output", "b", b.op(ATEN.full.default, [1], True, dtype=None), "R", (1,))
    b.output("output", "x", x, "R", (2,))
    executor = executor_of(b.program())
    one, true, _ = executor.run(executor.open([torch.ones(2)]), "forward")
    assert (one.dtype, true.dtype) == (torch.int64, torch.bool)


def training_inputs(rows=6, width=4):
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(rows, width), torch.randn(width, width), torch.randn(width, width)
    return x, w1, w2, torch.tensor(3.0), torch.randn(rows, width)


def test_segments_share_a_frame_and_frames_are_independent():
    executor = executor_of(data_parallel_training("dp=1"))
    frames, expected = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        x, t = torch.randn(6, 4), torch.randn(6, 4)
        w1, w2 = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
        y = torch.relu(x @ w1) @ w2
        expected.append((y.detach(), *torch.autograd.grad(y, (w1, w2), t)))
        frame = executor.open([x, w1, w2, torch.tensor(float(seed)), None])
        frames.append((frame, t, executor.run(frame, "forward")))
    for (frame, t, (y, more)), (wanted_y, w1_grad, w2_grad), seed in zip(
        reversed(frames), reversed(expected), (2, 1, 0), strict=True
    ):
        found = executor.run(frame, "backward", [t])
        assert not y.requires_grad
        torch.testing.assert_close(y, wanted_y)
        assert more.item() == seed + 1
        torch.testing.assert_close(found[0], w1_grad)
        torch.testing.assert_close(found[1], w2_grad)
        assert found[2] is None


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_no_tensor_survives_a_hundred_frames():
    executor = executor_of(data_parallel_training("dp=1"))
    x, w1, w2, seen, t = training_inputs()

    def step(*, backward: bool):
        frame = executor.open([x, w1, w2, seen, None])
        executor.run(frame, "forward")
        if backward:
            executor.run(frame, "backward", [t])
        frame.close()

    step(backward=True)
    before = live_tensors()
    for i in range(100):
        step(backward=i % 2 == 0)
    assert live_tensors() == before


def test_saved_activations_die_during_the_backward_and_others_during_the_forward():
    executor = executor_of(data_parallel_training("dp=1"))
    program = executor.program
    x, w1, w2, seen, t = training_inputs()
    frame = executor.open([x, w1, w2, seen, None])
    product = next(i for i, ins in enumerate(program.instructions) if ins.op == "aten.mm.default")
    relu = next(i for i, ins in enumerate(program.instructions) if ins.op == "aten.relu.default")
    executor.run(frame, "forward")
    saved = frame.values[program.instructions[relu].outputs[0]]
    assert frame.values[program.instructions[product].outputs[0]] is None
    assert saved is not None
    alive = weakref.ref(saved)
    del saved
    executor.run(frame, "backward", [t])
    assert alive() is None
    assert all(value is None for value in frame.values[: program.slots])


def test_an_exception_names_rank_instruction_line_and_remote_traceback():
    executor = executor_of(data_parallel_training("dp=1"))
    x, w1, w2, seen, _ = training_inputs()
    with pytest.raises(RankFailed, match=r"rank 0 failed at instruction 0.*aten\.mm.*model\.py:6") as caught:
        executor.run(executor.open([x[:, :2], w1, w2, seen, None]), "forward")
    assert caught.value.rank == 0
    assert "aten.mm.default" in caught.value.instruction
    assert caught.value.source.startswith("model.py:6")
    assert "RuntimeError" in caught.value.remote


def test_a_closed_or_used_frame_and_missing_inputs_are_refused():
    executor = executor_of(data_parallel_training("dp=1"))
    x, w1, w2, seen, t = training_inputs()
    frame = executor.open([x, w1, w2, seen, None])
    executor.run(frame, "forward")
    with pytest.raises(InputError, match="run it already"):
        executor.run(frame, "forward")
    with pytest.raises(InputError, match="expected 1 inputs"):
        executor.run(frame, "backward")
    frame.close()
    frame.close()
    with pytest.raises(InputError, match="closed"):
        executor.run(frame, "backward", [t])
    with pytest.raises(InputError, match="missing"):
        executor.open([x, None, w2, seen, None])
    with pytest.raises(InputError, match="expected 5 inputs"):
        executor.open([x])


class Recorder:
    def __init__(self) -> None:
        self.events = []

    def at(self, index: int) -> None:
        self.events.append(("at", index))

    def issue(self, index: int, fingerprint: int) -> None:
        self.events.append(("issue", index, fingerprint))

    def wait(self, index: int) -> None:
        self.events.append(("wait", index))


def test_a_monitor_sees_every_instruction_and_every_collective():
    program = emit(data_parallel_training("dp=1"))
    x, w1, w2, seen, t = training_inputs()
    recorder = Recorder()
    executor = FlatExecutor(load(program, 0), SingleCommunicator(), recorder)
    executor.stamps = []
    frame = executor.open([x, w1, w2, seen, None])
    watched = executor.run(frame, "forward") + executor.run(frame, "backward", [t])
    assert [e[1] for e in recorder.events if e[0] == "at"] == list(range(len(program.instructions)))
    assert [e[1] for e in recorder.events if e[0] == "issue"] == [c.instruction for c in program.collectives]
    assert len([e for e in recorder.events if e[0] == "wait"]) == len(program.collectives)
    assert [s.index for s in executor.stamps] == list(range(len(program.instructions)))
    assert all(a.stop <= b.start for a, b in zip(executor.stamps, executor.stamps[1:], strict=False))
    plain = FlatExecutor(load(program, 0), SingleCommunicator())
    frame = plain.open([x, w1, w2, seen, None])
    for one, two in zip(watched, plain.run(frame, "forward") + plain.run(frame, "backward", [t]), strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


def test_results_land_in_given_buffers():
    executor = executor_of(data_parallel_training("dp=1"))
    x, w1, w2, seen, _ = training_inputs()
    port = executor.program.segment_outputs("forward")[0]
    buffer = torch.full((6, 4), 9.0)
    found = executor.run(executor.open([x, w1, w2, seen, None]), "forward", out={port: buffer})
    assert found[0] is buffer
    torch.testing.assert_close(buffer, torch.relu(x @ w1) @ w2)
    with pytest.raises(InputError, match="does not fit"):
        executor.run(executor.open([x, w1, w2, seen, None]), "forward", out={port: torch.empty(2)})


def test_the_users_autocast_does_not_change_a_program():
    executor = executor_of(data_parallel_training("dp=1"))
    x, w1, w2, seen, _ = training_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = executor.run(executor.open([x, w1, w2, seen, None]), "forward")[0]
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.relu(x @ w1) @ w2)


def test_floating_replaces_every_floating_dtype_of_a_program():
    program = mixed_program()
    executor = executor_of(program, floating=torch.float64)
    found = executor.run(executor.open([torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)]), "step")
    assert {value.dtype for value in found[:4]} == {torch.float64}


def test_getitem_costs_no_call():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    program = mixed_program()
    emitted = emit(program)
    assert not any("getitem" in ins.op for ins in emitted.instructions)
    executor = executor_of(program)
    frame = executor.open([torch.randn(4, 6), torch.randn(6)])
    with Count():
        executor.run(frame, "step")
    assert Count.calls == len(emitted.instructions)
