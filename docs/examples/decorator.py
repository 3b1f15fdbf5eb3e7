"""The class decorator: every instance runs on the ranks, from its first call on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hocket


@hocket.parallel(mesh="tp=2")
class Net(nn.Module):
    """Returns the loss itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.down(F.silu(self.up(x))), target)


torch.manual_seed(0)
with Net(32) as model:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x = torch.randn(16, 32)
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x, x)
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.4f}")
