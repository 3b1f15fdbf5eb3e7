"""Run by torchrun in test_attach_door.py: trains on every rank and compares with the same training in one process."""

import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import hocket


class Net(nn.Module):
    """Two linears and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.down(F.gelu(self.up(x))), y)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Net()
    eager = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    tactic = {"tp": hocket.TensorParallel("d"), "zero": hocket.Zero("d")}[sys.argv[1]]
    with hocket.parallelize(model, "d=2", engine="attach", tactics=[tactic]) as m:
        optimizers: list[torch.optim.Optimizer] = []
        for step in range(3):
            x, y = torch.randn(4, 8, generator=generator), torch.randn(4, 8, generator=generator)
            losses = [net(x, y) for net in (m, eager)]
            torch.testing.assert_close(losses[0], losses[1])
            if step == 0:
                optimizers = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in (m, eager)]
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert any(isinstance(p, DTensor) and any(q.is_shard() for q in p.placements) for p in m.parameters())
        for (name, p), q in zip(m.named_parameters(), eager.parameters(), strict=True):
            assert isinstance(p, DTensor)
            torch.testing.assert_close(p.full_tensor().detach(), q.detach(), msg=name)
    print("equal")


main()
