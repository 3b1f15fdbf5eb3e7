"""The local engine computes what one process would, on the caller's own memory."""

from __future__ import annotations

import gc
import os
import threading

import pytest
import torch
from local_support import alive, mlp, mlp_bindings, mlp_tensors, open_files, single, slot, update_program, wait_gone

from hocket.runtime.engines.local import Limits, LocalEngine
from hocket.runtime.errors import InputError, ProgramError, RunError
from hocket.runtime.memory import default_arena
from hocket.runtime.mesh import Mesh

MESH = Mesh.parse("tp=2")


@pytest.fixture(scope="module")
def engine():
    with LocalEngine(MESH, threads=1) as made:
        yield made


def eager(x, up, down, tangent):
    x = x.clone().requires_grad_()
    y = torch.relu(x @ up) @ down
    return y, torch.autograd.grad(y, (up, down, x), tangent)


@pytest.mark.parametrize("mesh", ["tp=1", "tp=2", "tp=3", "dp=2,tp=2"])
def test_outputs_and_gradients_equal_one_process_on_even_and_uneven_meshes(mesh):
    mesh = Mesh.parse(mesh)
    x, up, down = mlp_tensors()
    tangent = torch.randn(6, 4)
    with LocalEngine(mesh, threads=1) as engine:
        handle = engine.load(mlp(mesh), mlp_bindings(up, down))
        ticket, (y,) = engine.forward(handle, [x])
        gradients = engine.backward(handle, ticket, [tangent])
    expected, wanted = eager(x, up, down, tangent)
    torch.testing.assert_close(y, expected)
    assert gradients[3] is None
    for found, want in zip(gradients[:3], wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_parameters_are_read_in_place_and_keep_identity(engine):
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    optimizer = torch.optim.SGD([up, down], lr=0.1)
    for _ in range(3):
        y = engine.forward(handle, [x])[1][0]
        torch.testing.assert_close(y, (torch.relu(x @ up) @ down).detach())
        up.grad, down.grad = torch.ones_like(up), torch.ones_like(down)
        optimizer.step()
    assert isinstance(up, torch.nn.Parameter)
    assert default_arena().locate(up) is not None


def test_parameters_given_other_memory_are_followed(engine):
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    up.data = torch.randn(8, 10)
    y = engine.forward(handle, [x])[1][0]
    torch.testing.assert_close(y, (torch.relu(x @ up) @ down).detach())
    up.data = torch.randn(4, 4)
    with pytest.raises(InputError, match="param:up"):
        engine.forward(handle, [x])


def test_outputs_belong_to_the_caller(engine):
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    kept = [engine.forward(handle, [x * k])[1][0] for k in range(5)]
    for k, y in enumerate(kept):
        torch.testing.assert_close(y, (torch.relu(x * k @ up) @ down).detach())
    with torch.enable_grad():
        kept[0].requires_grad_().mul(2).sum().backward()
        kept[1].add_(1)  # in place: they are no views
    del kept, y
    gc.collect()


def test_several_tickets_and_programs_are_alive_at_once(engine):
    x, up, down = mlp_tensors()
    first = engine.load(mlp(MESH), mlp_bindings(up, down))
    second = engine.load(mlp(MESH, batch=2), mlp_bindings(up, down))
    tangent = torch.randn(6, 4)
    a, _ = engine.forward(first, [x])
    b, _ = engine.forward(first, [2 * x])
    c, _ = engine.forward(second, [x[:2]])
    for ticket, scale in ((b, 2), (a, 1)):
        for found, want in zip(engine.backward(first, ticket, [tangent]), eager(scale * x, up, down, tangent)[1], strict=False):
            torch.testing.assert_close(found, want)
    gradients = engine.backward(second, c, [None])
    assert all(not gradient.any() for gradient in gradients[:3])
    engine.unload(second)
    engine.unload(second)


def test_a_ticket_is_used_once(engine):
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    ticket, _ = engine.forward(handle, [x])
    engine.backward(handle, ticket, [None])
    engine.release(ticket)
    with pytest.raises(InputError, match="saved values"):
        engine.backward(handle, ticket, [None])


def test_released_tickets_give_their_memory_back(engine):
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    gc.collect()
    base = default_arena().live_blocks()
    tickets = [engine.forward(handle, [x])[0] for _ in range(4)]
    assert default_arena().live_blocks() == base + 4  # their inputs
    for ticket in tickets[:2]:
        engine.release(ticket)
        engine.release(ticket)
    tickets = ticket = None  # the others are simply forgotten
    gc.collect()
    assert default_arena().live_blocks() == base


def test_steps_in_flight_are_bounded_and_in_order():
    with LocalEngine(MESH, threads=1, limits=Limits(window=4)) as engine:
        handle = engine.load(single(MESH, "aten.add.Tensor", [slot(0), 1]), {})
        steps = [engine.submit_forward(handle, [torch.full((4,), float(k))]) for k in range(20)]
        assert [float(step.result()[0][0]) for step in reversed(steps)] == [k + 1.0 for k in reversed(range(20))]


def test_updates_are_written_into_the_bound_tensor_after_every_rank_has_read_it(engine):
    count = torch.zeros(3)
    handle = engine.load(update_program(MESH), {("buffer", "count"): count})
    version = count._version
    tickets = []
    for step in range(3):
        ticket, (seen, updated) = engine.forward(handle, [torch.ones(3)])
        assert updated is count
        assert seen.tolist() == [step + 1.0] * 3
        assert count.tolist() == [step + 1.0] * 3
        tickets.append(ticket)
    assert count._version > version
    for step, ticket in enumerate(tickets):
        assert engine.backward(handle, ticket, [])[0].tolist() == [10.0 * step] * 3


def test_updates_in_flight_are_seen_by_the_next_step(engine):
    count = torch.zeros(3)
    handle = engine.load(update_program(MESH), {("buffer", "count"): count})
    steps = [engine.submit_forward(handle, [torch.ones(3)]) for _ in range(5)]
    assert [step.result()[0][0].item() for step in steps] == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_an_update_of_an_unbound_input_is_a_fresh_result(engine):
    handle = engine.load(update_program(MESH, kind="input"), {})
    given = torch.zeros(3)
    _, (_, updated) = engine.forward(handle, [given, torch.ones(3)])
    assert updated.tolist() == [1.0] * 3
    assert given.tolist() == [0.0] * 3


def test_threads_may_share_an_engine(engine):
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    wrong = []

    def work(scale):
        for _ in range(20):
            ticket, (y,) = engine.forward(handle, [scale * x])
            if not torch.allclose(y, torch.relu(scale * x @ up) @ down, atol=1e-4):
                wrong.append(scale)
            engine.backward(handle, ticket, [None])

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong


def test_bad_input_is_refused_and_the_engine_goes_on(engine):
    x, up, down = mlp_tensors()
    with pytest.raises(InputError, match="no input port"):
        engine.load(mlp(MESH), {("param", "other"): up})
    with pytest.raises(InputError, match=r"binding param:up: expected float32\[8, 10\], found float32\[10, 4\]"):
        engine.load(mlp(MESH), mlp_bindings(down, down))
    with pytest.raises(InputError, match="mesh tp=2"):
        engine.load(mlp(Mesh.parse("tp=4")), mlp_bindings(up, down))
    with pytest.raises(InputError, match="threads"):
        LocalEngine(MESH, threads=0)
    with pytest.raises(InputError, match="cpu or cuda"):
        LocalEngine(MESH, device="meta")
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    with pytest.raises(InputError, match="expected 1 inputs of forward, found 2"):
        engine.forward(handle, [x, x])
    with pytest.raises(InputError, match="expected a tensor, found int"):
        engine.forward(handle, [3])
    with pytest.raises(InputError, match="found float64"):
        engine.forward(handle, [x.double()])
    engine.forward(handle, [x])


def test_a_partial_output_is_refused(engine):
    with pytest.raises(ProgramError, match="is partial"):
        engine.load(single(MESH, "aten.add.Tensor", [slot(0), 1], layout=("P(sum)",)), {})


def test_a_cuda_engine_needs_a_device_per_rank():
    if torch.cuda.device_count() >= 2:
        pytest.skip("this machine has them")
    with pytest.raises(InputError, match="one CUDA device per rank"):
        LocalEngine(MESH, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_cuda_ranks_compute_the_same():
    x, up, down = (t.detach().cuda() for t in mlp_tensors())
    with LocalEngine(MESH, device="cuda") as engine:
        handle = engine.load(mlp(MESH), mlp_bindings(up, down))
        for scale in (1, 2):
            up.mul_(scale)
            y = engine.forward(handle, [x])[1][0]
            assert y.is_cuda
            torch.testing.assert_close(y, torch.relu(x @ up) @ down)


def test_wire_bytes_equal_the_formula(engine):
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    before = [counter.total for counter in engine.wire()]
    ticket, _ = engine.forward(handle, [x])
    engine.backward(handle, ticket, [None])
    after = [counter.total for counter in engine.wire()]
    assert [b - a for a, b in zip(before, after, strict=True)] == [4 * (6 * 4 + 6 * 8)] * 2  # 2 (p-1)/p of both all_reduces


def test_where_writes_may_be_seen_out_of_order_steps_go_by_the_socket(monkeypatch):
    monkeypatch.setattr("hocket.runtime.crew.writes_stay_in_order", lambda: False)
    x, up, down = mlp_tensors()
    with LocalEngine(MESH, threads=1) as engine:
        handle = engine.load(mlp(MESH), mlp_bindings(up, down))
        for _ in range(3):
            ticket, (y,) = engine.forward(handle, [x])
            gradients = engine.backward(handle, ticket, [torch.ones(6, 4)])
    expected, wanted = eager(x, up, down, torch.ones(6, 4))
    torch.testing.assert_close(y, expected.detach())
    for found, want in zip(gradients[:3], wanted, strict=True):
        torch.testing.assert_close(found, want)


def test_use_after_close_and_closing_twice():
    engine = LocalEngine(MESH, threads=1)
    pids = engine.pids
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    engine.close()
    engine.close()
    wait_gone(pids, 0.5)
    assert engine.pids == []
    for call in (lambda: engine.forward(handle, [x]), lambda: engine.load(mlp(MESH), mlp_bindings(up, down)), engine.wire):
        with pytest.raises(RunError, match="this engine is closed: it was closed"):
            call()
    assert torch.isfinite(up).all()


def test_a_forgotten_engine_ends_its_ranks():
    engine = LocalEngine(MESH, threads=1)
    pids = engine.pids
    assert alive(pids) == pids
    del engine
    gc.collect()
    wait_gone(pids)


def test_a_forked_child_is_told_and_does_no_harm(engine):
    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            engine.forward(handle, [x])
        except RunError as error:
            os.write(write, str(error).encode())
        engine.close()
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert "is a fork of it" in pipe.read()
    engine.forward(handle, [x])


def cycle():
    x, up, down = mlp_tensors()
    with LocalEngine(MESH, threads=1) as engine:
        handle = engine.load(mlp(MESH), mlp_bindings(up, down))
        ticket, _ = engine.forward(handle, [x])
        engine.backward(handle, ticket, [None])
        return engine.pids


@pytest.mark.parametrize("times", [50, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_starting_and_stopping_leaks_nothing(times):
    cycle()
    gc.collect()
    files, mapped = open_files(), shared_mappings()
    pids = [pid for _ in range(times) for pid in cycle()]
    gc.collect()
    assert not alive(pids)
    assert open_files() <= files
    assert shared_mappings() <= mapped


def shared_mappings():
    with open("/proc/self/maps") as file:
        return sum("memfd:hocket" in line for line in file)


def test_a_trace_shows_every_rank_instruction_and_collective(engine, tmp_path):
    import json

    x, up, down = mlp_tensors()
    handle = engine.load(mlp(MESH), mlp_bindings(up, down))
    engine.start_trace()
    ticket, _ = engine.forward(handle, [x])
    engine.backward(handle, ticket, [None])
    engine.trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for rank in range(2):
        own = [e for e in events if e["ph"] == "X" and e["pid"] == rank]
        assert {e["name"] for e in own} >= {"aten.mm.default", "aten.relu.default", "_c10d_functional.all_reduce.default"}
        assert all(e["dur"] >= 0 for e in own)
        assert any(e.get("args", {}).get("source", "").startswith("model.py:41") for e in own)
    starts, ends = ([e["id"] for e in events if e["ph"] == kind] for kind in "sf")
    assert starts == ends == [1, 2]
