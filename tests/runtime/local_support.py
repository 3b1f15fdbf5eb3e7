"""Small rank programs, faults to inject, and checks that nothing is left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from hocket.runtime.instruction import CallForm, Instruction
from hocket.runtime.mesh import Mesh
from hocket.runtime.program import Collective, PortSpec, RankProgram, Segment

AR, WAIT = "_c10d_functional.all_reduce.default", "_c10d_functional.wait_tensor.default"
LINE = "model.py:41 self.down(relu(self.up(x)))"


def slot(number):
    return {"slot": number}


def instruction(op, args, out, kwargs=None, location=1, phase="forward"):
    form, reads = CallForm.of(op, args, kwargs or {}, 0, phase)
    return Instruction(form, reads, (out,), reads if op == WAIT else (), location)


def mlp(mesh: Mesh, batch=6, width=8, hidden=10, out=4, axis="tp") -> RankProgram:
    """y = relu(x @ up) @ down with up cut by columns and down by rows over ``axis``; forward and backward."""
    names = mesh.names

    def lay(placement):
        return tuple(placement if name == axis else "R" for name in names)

    backward = {"phase": "backward-input"}
    instructions = (
        instruction("aten.mm.default", [slot(0), slot(1)], 4),
        instruction("aten.relu.default", [slot(4)], 5),
        instruction("aten.mm.default", [slot(5), slot(2)], 6),
        instruction(AR, [slot(6), "sum", axis], 7),
        instruction(WAIT, [slot(7)], 8),
        instruction("aten.t.default", [slot(5)], 9, **backward),
        instruction("aten.mm.default", [slot(9), slot(3)], 10, **backward),
        instruction("aten.t.default", [slot(2)], 11, **backward),
        instruction("aten.mm.default", [slot(3), slot(11)], 12, **backward),
        instruction("aten.threshold_backward.default", [slot(12), slot(4), 0], 13, **backward),
        instruction("aten.t.default", [slot(0)], 14, **backward),
        instruction("aten.mm.default", [slot(14), slot(13)], 15, **backward),
        instruction("aten.t.default", [slot(1)], 16, **backward),
        instruction("aten.mm.default", [slot(13), slot(16)], 17, **backward),
        instruction(AR, [slot(17), "sum", axis], 18, **backward),
        instruction(WAIT, [slot(18)], 19, **backward),
    )
    f = "float32"
    return RankProgram(
        mesh,
        (
            PortSpec("input", "x", (batch, width), f, lay("R")),
            PortSpec("param", "up", (width, hidden), f, lay("S(1)")),
            PortSpec("param", "down", (hidden, out), f, lay("S(0)")),
            PortSpec("tangent", "y", (batch, out), f, lay("R")),
        ),
        (
            PortSpec("output", "y", (batch, out), f, lay("R")),
            PortSpec("gradient", "up", (width, hidden), f, lay("S(1)")),
            PortSpec("gradient", "down", (hidden, out), f, lay("S(0)")),
            PortSpec("gradient", "x", (batch, width), f, lay("R")),
            PortSpec("gradient", "none", (), "none", ()),
        ),
        instructions,
        (
            Segment("forward", 0, 5, (0, 1, 2), ((0, 8),), ()),
            Segment("backward", 5, 16, (3,), ((1, 15), (2, 10), (3, 19), (4, -1)), ()),
        ),
        ("", LINE),
        (Collective(3, AR, axis, (batch, out), f), Collective(14, AR, axis, (batch, width), f)),
        20,
    )


def mlp_tensors(batch=6, width=8, hidden=10, out=4):
    make = torch.Generator().manual_seed(0)
    up = torch.nn.Parameter(torch.randn(width, hidden, generator=make))
    down = torch.nn.Parameter(torch.randn(hidden, out, generator=make))
    return torch.randn(batch, width, generator=make), up, down


def mlp_bindings(up, down):
    return {("param", "up"): up, ("param", "down"): down}


def single(mesh, op, args, shape=(4,), dtype="float32", layout=None, kwargs=None):
    """out = op(x) in one instruction, on every rank, without communication."""
    layout = layout or ("R",) * len(mesh.axes)
    return RankProgram(
        mesh,
        (PortSpec("input", "x", shape, dtype, layout),),
        (PortSpec("output", "y", shape, dtype, layout),),
        (instruction(op, args, 1, kwargs),),
        (Segment("forward", 0, 1, (0,), ((0, 1),), ()),),
        ("", LINE),
        (),
        2,
    )


def update_program(mesh, kind="buffer"):
    """seen = count + x; count <- count + 1 (in the first segment); late = 10 * count as it was, in the second."""
    where = ("R",) * len(mesh.axes)
    ports = (PortSpec(kind, "count", (3,), "float32", where), PortSpec("input", "x", (3,), "float32", where))
    outputs = (
        PortSpec("output", "seen", (3,), "float32", where),
        PortSpec("update", "count", (3,), "float32", where),
        PortSpec("gradient", "x", (3,), "float32", where),
    )
    code = (
        instruction("aten.add.Tensor", [slot(0), slot(1)], 2),
        instruction("aten.add.Tensor", [slot(0), 1], 3),
        instruction("aten.mul.Tensor", [slot(0), 10], 4),
    )
    segments = (Segment("forward", 0, 2, (0, 1), ((0, 2), (1, 3)), ()), Segment("backward", 2, 3, (), ((2, 4),), ()))
    return RankProgram(mesh, ports, outputs, code, segments, ("", "bn.py:1 count"), (), 5)


HOOK = """
import ctypes, os, resource, signal, time, torch
RANK, INDEX, HIT, FAULT, EDIT = {rank}, {index}, {hit}, {fault!r}, {edit!r}

def fault():
    if FAULT == "raise":
        raise ValueError("injected failure")
    if FAULT == "raise late":  # when the other ranks have come as far as they can
        time.sleep(0.7)
        raise ValueError("injected failure")
    if FAULT == "sleep":
        time.sleep(1e6)
    if FAULT == "spin":
        while True:
            pass
    if FAULT == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if FAULT == "segv":
        ctypes.string_at(0)
    if FAULT == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "exit":
        os._exit(3)
    if FAULT == "memory":
        torch.empty(1 << 50)
    if FAULT == "limit":
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
        bytearray(256 << 20)

class Watch:
    def __init__(self, page):
        self.issue, self.wait, self.page, self.hits = page.issue, page.wait, page, 0

    def at(self, index):
        self.page.at(index)
        if index == INDEX:
            self.hits += 1
            if self.hits == HIT:
                fault()

def install(worker):
    if worker.rank != RANK:
        return
    if FAULT:
        worker.monitor = Watch(worker.page)
    if EDIT:
        read = worker.read_program
        def changed(text):
            program = read(text)
            code = list(program.instructions)
            for index, op, args, kwargs in EDIT:
                code[index] = code[index].calling(op, args, kwargs)
            import dataclasses
            left = tuple(c for c in program.collectives if code[c.instruction].op == c.op)
            return dataclasses.replace(program, instructions=tuple(code), collectives=left)
        worker.read_program = changed
"""


def write_hook(folder: Path, *, rank=1, index=2, hit=1, fault="", edit=()):
    """A hook file: a fault when ``rank`` starts instruction ``index`` for the ``hit``-th time; or its program is edited."""
    path = folder / "hook.py"
    path.write_text(HOOK.format(rank=rank, index=index, hit=hit, fault=fault, edit=list(edit)))
    return path


def alive(pids):
    """The processes that still run (zombies do not count)."""
    found = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] != "Z":
                    found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def wait_gone(pids, seconds=3.0):
    """Seconds until all are gone; fails beyond ``seconds``."""
    start = time.monotonic()
    while left := alive(pids):
        assert time.monotonic() - start < seconds, f"still alive: {left}"
        time.sleep(0.005)
    return time.monotonic() - start


def open_files():
    return len(os.listdir("/proc/self/fd"))
