"""Run by a launcher on every rank; prints one line of JSON per rank."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from local_support import mlp, mlp_tensors, update_program

from hocket.runtime.engines.attach import AttachEngine
from hocket.runtime.errors import CollectiveMismatch, InputError
from hocket.runtime.mesh import Mesh

torch.set_num_threads(1)
mesh = Mesh.parse("tp=2")
x, up, down = mlp_tensors()
tangent = torch.ones(6, 4)
said = {}
with AttachEngine(mesh, device="cpu") as engine:
    rank = said["rank"] = engine.rank
    mine = {("param", "up"): up.chunk(2, 1)[rank].contiguous(), ("param", "down"): down.chunk(2, 0)[rank]}
    handle = engine.load(mlp(mesh), mine)
    ticket, (y,) = engine.forward(handle, [x])
    d_up, d_down, d_x, none = engine.backward(handle, ticket, [tangent])
    leaf = x.clone().requires_grad_()
    expected = torch.relu(leaf @ up) @ down
    wanted = torch.autograd.grad(expected, (up, down, leaf), tangent)
    torch.testing.assert_close(y, expected.detach())
    torch.testing.assert_close(d_up, wanted[0].chunk(2, 1)[rank])
    torch.testing.assert_close(d_down, wanted[1].chunk(2, 0)[rank])
    torch.testing.assert_close(d_x, wanted[2])
    said["none"] = none is None
    said["bytes"] = int(engine.wire().total)
    try:
        engine.backward(handle, ticket, [tangent])
    except InputError as error:
        said["twice"] = str(error)
    try:
        engine.load(mlp(mesh), {("param", "up"): up})
    except InputError as error:
        said["whole"] = str(error)
    count = torch.zeros(3)
    counter = engine.load(update_program(mesh), {("buffer", "count"): count})
    ticket, _ = engine.forward(counter, [torch.ones(3)])
    said["count"] = count.tolist()
    said["late"] = engine.backward(counter, ticket, [])[0].tolist()
    try:
        engine.load(mlp(mesh, batch=6 + rank), mine)
    except CollectiveMismatch as error:
        said["mismatch"] = str(error)
said["left"] = dist.is_initialized()
os.write(1, f"{json.dumps(said)}\n".encode())  # in one piece: the ranks share the pipe
