"""Arguments that cannot be right are refused before any work, by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hocket
from hocket.errors import InputError

X = torch.ones(4, 8)


def _open(**changes: object) -> nn.Module:
    arguments = {"model": nn.Linear(8, 8), "mesh": "d=2", "example_args": (X,), "engine": "sim", "verify": "types", **changes}
    return hocket.parallelize(**arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine": None}, "engine must be one of"),
        ({"engine": int}, "engine must be one of"),
        ({"example_args": {"input": X}}, "keyword arguments go into example_kwargs"),
        ({"example_args": "x"}, "tuple of the positional arguments"),
        ({"example_kwargs": [X]}, "example_kwargs must be a dict"),
        ({"verify": True}, "verify must be"),
        ({"verify": "yes"}, "verification level"),
        ({"memory_limit": "much"}, "memory must be"),
        ({"memory_limit": -1}, "memory_limit must be positive"),
        ({"memory_limit": [1]}, "memory_limit must be a number"),
        ({"constraints": ["weight"]}, "constraints must be a dict"),
        ({"model": nn.LazyLinear(8)}, "run the plain model once"),
        ({"mesh": "two"}, "expected NAME=SIZE"),
    ],
)
def test_an_argument_that_cannot_be_right_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        _open(**changes)


@pytest.mark.parametrize("changes", [{"example_args": X}, {"memory_limit": "1GB"}, {"mesh": "2"}, {"mesh": " d = 2 "}], ids=str)
def test_short_ways_of_writing_an_argument(changes: dict[str, object]) -> None:
    assert _open(**changes).plan.mesh.size == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_module_is_refused() -> None:
    with pytest.raises(InputError, match="TorchScript"):
        _open(model=torch.jit.script(nn.Linear(8, 8)))


def test_a_parallel_part_of_a_model_is_named() -> None:
    with pytest.raises(InputError, match="submodule 1 is parallel already"):
        _open(model=nn.Sequential(nn.Linear(8, 8), _open()))


def test_the_decorator_without_parentheses_says_what_to_write() -> None:
    with pytest.raises(InputError, match=r'@hocket.parallel\(mesh="tp=2"\) above class Linear'):
        hocket.parallel(nn.Linear)
