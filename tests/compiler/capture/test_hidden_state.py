"""What a forward pass reads or changes besides its inputs is named, not frozen."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.errors import CaptureError, InputError

X = torch.ones(4, 8)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.calls = 0


class Scaled(Base):
    """Its second call computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.up(x) * self.calls


class ScaledByClass(nn.Module):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Logged(Base):
    """Counts its calls and computes the same in each."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.up(x)


class Blocks(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("model", [Scaled(), ScaledByClass(), Blocks(Scaled)], ids=["root", "class attribute", "repeated blocks"])
def test_an_attribute_that_every_call_changes_is_refused_where_results_depend_on_it(model: nn.Module) -> None:
    before = {name: dict(part.__dict__) for name, part in model.named_modules()}
    with pytest.raises(CaptureError, match=r"changes the attribute .*calls.*register_buffer"):
        capture(model, (X,))
    assert {name: dict(part.__dict__) for name, part in model.named_modules()} == before


@pytest.mark.parametrize("model", [Logged(), Blocks(Logged)], ids=["root", "repeated blocks"])
def test_an_attribute_that_nothing_depends_on_may_change(model: nn.Module) -> None:
    capture(model, (X,))
    assert all(part.calls == 0 for part in model.modules() if isinstance(part, Logged))


@pytest.mark.parametrize(
    ("draw", "words"),
    [(random.random, "Python's random"), (lambda: float(np.random.rand()), "numpy.random")],
    ids=["python", "numpy"],
)
def test_draws_from_generators_outside_torch_are_refused_and_undone(draw, words: str) -> None:
    before, legacy = random.getstate(), np.random.get_state()[1].copy()
    with pytest.raises(CaptureError, match=words):
        capture(lambda x: x * draw(), (X,))
    assert random.getstate() == before
    assert (np.random.get_state()[1] == legacy).all()


def test_an_argument_with_tensors_in_an_object_of_its_own_is_refused() -> None:
    with pytest.raises(InputError, match=r"args\[1\] \(SimpleNamespace\) holds tensors"):
        capture(lambda x, batch: x * batch.mask, (X, SimpleNamespace(mask=X)))
    capture(lambda x, settings: x * settings.scale, (X, SimpleNamespace(scale=2.0)))


def test_an_argument_that_the_function_changes_is_refused_and_left_as_found() -> None:
    memory: SimpleNamespace = SimpleNamespace(seen=[])

    def remember(x: Tensor, memory: SimpleNamespace) -> Tensor:
        memory.seen.append(x * 2)
        return memory.seen[-1]

    with pytest.raises(InputError, match=r"changes its argument args\[1\]"):
        capture(remember, (X, memory))
    assert memory.seen == []


def test_an_output_with_tensors_in_an_object_of_its_own_becomes_none_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hocket"):
        program = capture(lambda x: {"y": x * 2, "cache": SimpleNamespace(keys=[x * 3])}, (X,))
    assert "out['cache'] is a SimpleNamespace" in caplog.text
    assert any(not decision.applied and decision.node == "out['cache']" for decision in program.decisions)
    assert len(program.results) == 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_a_product_of_different_dtypes_is_refused_with_the_line(dtype: torch.dtype) -> None:
    with pytest.raises(CaptureError, match=r"test_hidden_state\.py:\d+ return self\.up\(x\).*takes tensors of one dtype"):
        capture(Logged(), (X.to(dtype),))


def test_a_failing_trace_says_one_thing_once(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    def branch(x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(CaptureError, match=r"test_hidden_state\.py:\d+ return x \* 2 if") as branching:
        capture(branch, (X,))
    assert str(branching.value).count("one graph for every value") == 1
    assert str(branching.value).endswith("(torch.export and dynamo failed likewise)")
    with pytest.raises(CaptureError, match="call the plain model with the same inputs"):
        capture(Logged(), (torch.ones(4, 7),))
    written = capfd.readouterr()
    assert written.out == written.err == ""
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(("args", "kwargs", "words"), [((X, X), {}, "too many"), ((), {"y": X}, "missing|unexpected")])
def test_a_call_that_the_signature_refuses_is_refused_at_the_door(args, kwargs, words: str) -> None:
    with pytest.raises(InputError, match=rf"do not fit Logged\(x: .*\).*: .*({words})"):
        capture(Logged(), args, kwargs)
