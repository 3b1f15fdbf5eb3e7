"""An ordinary module and an ordinary training loop; one added line runs them on two ranks of this machine."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hocket


class Net(nn.Module):
    """A classifier, written as anyone would."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


torch.manual_seed(0)
x, y = torch.randn(32, 64), torch.randint(10, (32,))

model = hocket.parallelize(Net(), mesh="tp=2", tactics=[hocket.TensorParallel("tp")], example_args=(x,))

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for step in range(5):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    print(f"step {step}  loss {loss.item():.4f}")

print(model.explain("up.weight"))
model.close()
