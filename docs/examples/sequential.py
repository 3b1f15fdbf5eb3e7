"""A recurrence of your own as one node, solved in blocks: the same outputs and gradients as the plain loop."""

import torch
from torch import nn

import hocket


class Leaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside, self.readout = nn.Linear(16, 16, bias=False), nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x):
        def step(state, piece):
            new = 0.5 * state + 0.5 * torch.tanh(self.outside(piece) + self.inside(state))
            return new, self.readout(new)

        return hocket.sequential(step)(x.new_zeros(x.shape[1], 16), x)[1]


if __name__ == "__main__":
    torch.manual_seed(0)
    model, x = Leaky(), torch.randn(64, 2, 4)
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    with hocket.parallelize(model, "one=1", (x,), tactics=[hocket.Jacobi("blocks:16")], engine="sim") as parallel:
        print(*[line for line in str(parallel.explain()).splitlines() if "a chain of" in line], sep="\n")
        parallel.zero_grad()
        parallel(x).square().mean().backward()
        worst = max(float((p.grad - expected[name]).abs().amax()) for name, p in parallel.named_parameters())
        print(f"gradients like the loop's: {worst < 1e-6}")
