"""Run by torchrun in test_chain_time_ranks.py: a recurrent layer cut in time over the launched ranks, beside eager."""

import copy

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import hocket


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.GRU(3, 4)
    eager = copy.deepcopy(model)
    x = torch.randn(25, 2, 3)
    with hocket.parallelize(model, "t=2", engine="attach", tactics=[hocket.Jacobi(axis="t")], verify="off") as parallel:
        outputs = [net(x)[0] for net in (parallel, eager)]
        torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=2e-6)
        for output in outputs:
            output.square().mean().backward()
        for p, q in zip(parallel.parameters(), eager.parameters(), strict=True):
            assert p.grad is not None
            gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            torch.testing.assert_close(gradient, q.grad, rtol=1e-4, atol=1e-6)
    print("equal")


main()
