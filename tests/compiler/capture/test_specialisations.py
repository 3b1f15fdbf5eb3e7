"""The bounded cache of compiled forms, and the names of sizes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from hocket.compiler.capture import Specialisations, capture
from hocket.compiler.errors import InputError


class Counting:
    def __init__(self) -> None:
        self.made: list[tuple[int, ...]] = []

    def __call__(self, training, args, kwargs):
        self.made.append(tuple(args[0].shape))
        return len(self.made)


def test_a_known_form_is_not_made_again() -> None:
    cache, make, model = Specialisations(4), Counting(), nn.Linear(2, 2)
    x = torch.ones(3, 2)
    assert cache.get(model, (x,), {"scale": 2}, training=True, make=make) == 1
    assert cache.get(model, (x + 1,), {"scale": 2}, training=True, make=make) == 1
    assert len(make.made) == 1


def test_everything_a_program_depends_on_is_in_the_key() -> None:
    cache, make, model = Specialisations(20), Counting(), nn.Linear(2, 2)
    x = torch.ones(3, 2)

    def get(*args, training=True, **kwargs):
        return cache.get(model, args, kwargs, training=training, make=make)

    forms = [
        get(x),
        get(x[:2]),
        get(x.double()),
        get(x.clone().requires_grad_()),
        get(x, 1),
        get(x, True),
        get(x, 1.0),
        get(x, flag=1),
    ]
    forms.append(get(x, training=False))
    with torch.no_grad():
        forms.append(get(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forms.append(get(x))
    model.eval()
    forms.append(get(x))
    model.weight.requires_grad_(False)
    forms.append(get(x))
    assert forms == list(range(1, len(forms) + 1))


def test_the_least_recently_used_form_is_forgotten_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    cache, make = Specialisations(2), Counting()
    with caplog.at_level(logging.WARNING, "hocket"):
        for size in (1, 2, 1, 3, 1, 2):
            cache.get(None, (torch.ones(size),), training=True, make=make)
    assert make.made == [(1,), (2,), (3,), (2,)]
    assert len(cache) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "hocket: new input shape args[0] float32[2]: re-specialising (2 of 2 kept)",
        "hocket: new input shape args[0] float32[3]: re-specialising (2 of 2 kept)",
        "hocket: new input shape args[0] float32[2]: re-specialising (2 of 2 kept)",
    ]


def test_a_failing_maker_leaves_the_cache_alone() -> None:
    cache = Specialisations(2)

    def fail(training, args, kwargs):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cache.get(None, (torch.ones(1),), training=True, make=fail)
    assert len(cache) == 0


def test_no_capacity_is_refused() -> None:
    with pytest.raises(InputError):
        Specialisations(0)


def test_sizes_have_names_and_equal_ones_share_them() -> None:
    def f(x, y, z):
        return x.sum() + y.sum() + z.sum()

    args = (torch.ones(4, 6), torch.ones(4), torch.ones(5, 6, 7))
    assert capture(f, args, train=False).sizes == {"B": 4, "S": 6, "A": 5, "C": 7}
    named = capture(f, args, train=False, sizes={"args[0]": ("N", "T"), "args[2]": ("M", "T", None)})
    assert named.sizes == {"N": 4, "T": 6, "M": 5, "B": 4}
    with pytest.raises(InputError, match="the inputs are"):
        capture(f, args, train=False, sizes={"x": ("N",)})
    with pytest.raises(InputError, match="use two names"):
        capture(f, args, train=False, sizes={"args[0]": ("N", "N")})
