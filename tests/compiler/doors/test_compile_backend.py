"""torch.compile(backend="hocket"): the entry point alone, in training and inference."""

import copy

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


def test_training_through_the_backend_follows_eager() -> None:
    model = net()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, backend="hocket", options={"mesh": "tp=2", "engine": "sim"})
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, eager)]
    for _ in range(2):
        x = torch.randn(4, 8)
        for call, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_inference_through_the_backend_equals_eager() -> None:
    model = net()
    compiled = torch.compile(model, backend="hocket", options={"mesh": "tp=2", "engine": "sim"})
    x = torch.randn(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(("options", "words"), [({}, "needs a mesh"), ({"mesh": "tp=2", "speed": 1}, "no option 'speed'")])
def test_bad_options_are_refused(options: dict[str, object], words: str) -> None:
    compiled = torch.compile(net(), backend="hocket", options=options)
    with pytest.raises(Exception, match=words):
        compiled(torch.randn(4, 8))
