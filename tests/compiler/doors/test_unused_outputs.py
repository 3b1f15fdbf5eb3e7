"""What the loss does not use has no gradient, as in eager torch: an optimizer leaves it alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import hocket


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right, self.spare = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.body(x)
        left, right = self.left(hidden), self.right(hidden)
        return left, right, left.mean() + right.mean()


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1)], ids=str)
def test_a_loss_of_some_outputs_gives_gradients_where_eager_does(used: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    plain = Heads()
    x = torch.randn(4, 8)
    with hocket.parallelize(copy.deepcopy(plain), "d=2", engine="sim", verify="off") as model:
        for one in (plain, model):
            outputs = one(x)
            torch.stack([outputs[i].square().mean() for i in used]).sum().backward()
        for name, parameter in plain.named_parameters():
            found = model.get_parameter(name).grad
            assert (found is None) == (parameter.grad is None), name
            if found is not None:
                torch.testing.assert_close(found, parameter.grad)


def test_training_one_head_leaves_the_weights_of_the_other_alone() -> None:
    model = Heads()
    before = model.right.weight.detach().clone()
    with hocket.parallelize(model, "tp=2", tactics=[hocket.TensorParallel("tp")], verify="off") as parallel:
        optimizer = torch.optim.AdamW(parallel.parameters(), weight_decay=0.5)
        for _ in range(2):
            parallel(torch.ones(4, 8))[0].sum().backward()
            optimizer.step()
    assert torch.equal(model.right.weight, before)
