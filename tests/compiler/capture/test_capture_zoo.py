"""Every corner of PyTorch in the zoo is captured and equals eager; what has no single graph is refused with the user's line."""

from __future__ import annotations

import pytest
import torch
from capture_reference import assert_like_eager, interpret, values_of
from capture_zoo import CASES, Linear
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.errors import CaptureError, InputError
from hocket.compiler.program import RoleKind


@pytest.mark.parametrize("name", CASES)
def test_training_program_equals_eager(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = CASES[name]()
    assert_like_eager(model, args, kwargs, 1e-2 if "bfloat16" in name else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_inference_program_equals_eager(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = CASES[name]()
    program = capture(model, args, kwargs, train=False)
    kinds = {role.kind for role in program.signature.outputs}
    assert kinds <= {RoleKind.OUTPUT, RoleKind.UPDATE}
    found = interpret(program, values_of(program, model, args, kwargs, {}))
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(model(*args, **kwargs))
    for place, value in zip(program.signature.out_leaves, expected, strict=True):
        if isinstance(place, int):
            torch.testing.assert_close(found[program.signature.outputs[place]], value, rtol=1e-4, atol=1e-5)


class BranchOnData(Linear):
    def forward(self, x):
        if x.sum() > 0:
            return self.linear(x)
        return self.linear(-x)


class Item(Linear):
    def forward(self, x):
        return self.linear(x) * x.abs().max().item()


class Nonzero(Linear):
    def forward(self, x):
        kept = x[x > 0]
        return self.linear(x) + kept.sum()


class Permutation(Linear):
    def forward(self, x):
        return self.linear(x[torch.randperm(4)])


class ClosesOverAParameter(Linear):
    outside = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.linear(x) * BUILDER["p"]


class ChangesAPlainTensor(Linear):
    def __init__(self):
        super().__init__()
        self.count = torch.zeros(1)

    def forward(self, x):
        self.count += 1
        return self.linear(x) * self.count


BUILDER = {"p": nn.Parameter(torch.ones(8))}

REFUSED = [
    (BranchOnData, "if x.sum() > 0:", "torch.where"),
    (Item, "x.abs().max().item()", "torch.where"),
    (Nonzero, "kept = x[x > 0]", "fixed shape"),
    (Permutation, "torch.randperm(4)", "outside the model"),
    (ClosesOverAParameter, "BUILDER", "nn.Parameter"),
    (ChangesAPlainTensor, "self.count += 1", "register_buffer"),
]


@pytest.mark.parametrize(("kind", "line", "way_out"), REFUSED)
def test_a_refused_model_gets_its_line_and_the_way_out(kind: type[nn.Module], line: str, way_out: str) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(kind(), (torch.randn(4, 8),))
    assert "test_capture_zoo.py:" in str(caught.value)
    assert line in str(caught.value)
    assert way_out in str(caught.value)


def test_a_refused_model_is_left_as_found() -> None:
    model = Item()
    weight = model.linear.weight
    with pytest.raises(CaptureError):
        capture(model, (torch.randn(4, 8),))
    assert model.linear.weight is weight


@pytest.mark.parametrize(
    ("target", "args", "words"),
    [
        (nn.Linear, (torch.ones(2, 2),), "class Linear"),
        (3, (torch.ones(2, 2),), "found int"),
        (nn.Linear(2, 2), (), "none at all"),
        (nn.Linear(2, 2), (1.0, "x"), "float, str"),
        (nn.Linear(2, 2, device="meta"), (torch.ones(2, 2),), "meta device"),
        (nn.Linear(2, 2), (torch.ones(2, 2, device="meta"),), "meta device"),
        (nn.Linear(2, 2), (torch.ones(2, 2).to_sparse(),), "dense tensor"),
    ],
)
def test_bad_arguments_are_refused_at_the_door(target: object, args: tuple, words: str) -> None:
    with pytest.raises(InputError, match=words):
        capture(target, args)
