"""Let the gradients of a small batch travel as their factors, where that takes less time than to add them up."""

import torch
from torch import nn

import hocket

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 1024, bias=False), nn.ReLU(), nn.Linear(1024, 256, bias=False))
x = torch.randn(8, 256)

plain = model(x)
plain.square().sum().backward()
wanted = [parameter.grad.clone() for parameter in model.parameters()]
model.zero_grad()

# data parallel: each rank has four rows, and the gradient of a weight is the sum of both ranks' products of four columns
# and four rows
tactics = [hocket.DataParallel("dp"), hocket.OverlapTiles()]
with hocket.parallelize(model, "dp=2", example_args=(x,), tactics=tactics, engine="sim") as parallel:
    out = parallel(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, plain)
    for parameter, gradient in zip(parallel.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)
    text = " ".join(str(parallel.explain()).split())
    print(parallel.explain("factors"))
    print("collectives that were looked at:", text.count("swap-products"))
    assert "swap-products" in text
