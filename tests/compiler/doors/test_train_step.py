"""The fused whole step follows ordinary training, keeps the optimizer's state true, and obeys schedulers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hocket
from hocket.errors import InputError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


class WithLoss(nn.Module):
    """Returns the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.body(x), y)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.filterwarnings("error:.*lr_scheduler.step")
@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
@pytest.mark.parametrize("tactic", [hocket.DataParallel("d"), hocket.Zero("d")])
def test_steps_follow_ordinary_training_under_a_scheduler(kind: str, tactic: object) -> None:
    model = WithLoss()
    eager = copy.deepcopy(model)
    ours, theirs = (OPTIMIZERS[kind](m.parameters()) for m in (model, eager))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (ours, theirs)]
    with hocket.train_step(model, "d=2", ours, engine="sim", tactics=[tactic], verify="types") as step:
        for _ in range(3):
            x, y = torch.randn(4, 8), torch.randn(4, 4)
            loss = step(x, y)
            theirs.zero_grad()
            want = eager(x, y)
            want.backward()
            theirs.step()
            torch.testing.assert_close(loss, want.detach())
            for schedule in schedules:
                schedule.step()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)
    for got, state in zip(ours.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True):
        for key, value in state.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(got[key], value, msg=key)


def test_a_loss_function_outside_the_model() -> None:
    model = net()
    with hocket.train_step(
        model,
        "d=2",
        torch.optim.SGD(model.parameters(), lr=0.1),
        (torch.randn(4, 8),),
        loss=lambda y: y.square().mean(),
        engine="sim",
    ) as step:
        x = torch.randn(4, 8)
        losses = [float(step(x)) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]


def test_a_model_without_a_loss_is_refused() -> None:
    model = net()
    with pytest.raises(InputError, match="loss"):
        hocket.train_step(model, "d=2", torch.optim.SGD(model.parameters(), lr=0.1), (torch.randn(4, 8),), engine="sim")
