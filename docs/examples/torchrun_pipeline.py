"""A pipeline under any launcher: every rank runs this file and keeps the parameters of its own stage.

torchrun --nproc-per-node 2 torchrun_pipeline.py
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import hocket


class Net(nn.Module):
    """Returns the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4)))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (self.layers(x) - target).square().mean()


torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(16, 32)  # the same global batch everywhere
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

with hocket.train_step(model, "pp=2", optimizer, engine="attach", tactics=[hocket.PipelineParallel(microbatches=4)]) as step:
    for number in range(4):
        loss = step(x, x.tanh())  # the loss is on every rank
        if dist.get_rank() == 0:
            print(f"step {number}  loss {loss.item():.4f}")

    here = sorted(model.state_dict())
    for rank in range(2):
        dist.barrier()
        if dist.get_rank() == rank:
            print(f"rank {rank} holds {here[0]} .. {here[-1]}", flush=True)

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    dcp.save({"model": model.state_dict()}, checkpoint_id=folder[0])  # every rank writes its own part

    plain = Net()
    whole = {"model": plain.state_dict()}
    dcp.load(whole, checkpoint_id=folder[0])  # and any process reads all of it
    plain.load_state_dict(whole["model"])
    if dist.get_rank() == 0:
        print(f"the plain model goes on from {plain(x, x.tanh()).item():.4f}")
