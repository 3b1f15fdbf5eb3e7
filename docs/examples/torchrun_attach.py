"""One script, any launcher: every rank runs this file and keeps its own pieces of the parameters, as DTensors.

torchrun --nproc-per-node 2 torchrun_attach.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hocket


class Net(nn.Module):
    """Returns the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.down(F.relu(self.up(x))), target)


torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(16, 32)  # the same global batch everywhere: each rank takes its piece

with hocket.parallelize(Net(), "dp=2", engine="attach", tactics=[hocket.Zero("dp")], example_args=(x, x)) as model:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # made after parallelize: the parameters are DTensors now
    for step in range(4):
        optimizer.zero_grad()
        loss = model(x, x)
        loss.backward()
        optimizer.step()
        if torch.distributed.get_rank() == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    if torch.distributed.get_rank() == 0:
        weight = model.up.weight
        print(f"up.weight is {tuple(weight.shape)}, this rank holds {tuple(weight.to_local().shape)} ({weight.placements[0]})")
