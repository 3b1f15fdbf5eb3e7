"""The whole step as one program: the ranks share the optimizer's work and its state too (ZeRO stage 1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hocket


class Net(nn.Module):
    """Returns the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.layers(x), y)


torch.manual_seed(0)
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)

with hocket.train_step(model, "dp=2", optimizer, tactics=[hocket.Zero("dp", stage=1)]) as step:
    x, y = torch.randn(16, 32), torch.randint(4, (16,))
    for _ in range(8):
        loss = step(x, y)
        schedule.step()
        print(f"loss {loss.item():.4f}  next rate {schedule.get_last_lr()[0]:.5f}")

# parameters and optimizer state were updated in place: both are ordinary here, and can be saved as ever
print("moments kept for", len(optimizer.state_dict()["state"]), "parameters; model has", len(model.state_dict()), "tensors")
