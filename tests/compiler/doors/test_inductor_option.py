"""The option ``inductor`` of the doors."""

import copy

import pytest
import torch
from torch import nn

import hocket
from hocket.errors import InputError
from hocket.runtime.engines.sim import SimEngine


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Softmax(-1))


def test_an_engine_without_ranks_of_its_own_refuses_it() -> None:
    with pytest.raises(InputError, match=r"inductor=True is for engine='local' and engine='attach'"):
        hocket.parallelize(model(), "tp=2", engine="sim", inductor=True)


def test_an_engine_that_is_open_already_cannot_be_changed() -> None:
    mesh = hocket.Mesh.parse("tp=2")
    with pytest.raises(InputError, match=r"LocalEngine\(mesh, inductor=True\)"):
        hocket.parallelize(model(), mesh, engine=SimEngine(mesh), inductor=True)


def test_anything_but_a_truth_value_is_refused() -> None:
    with pytest.raises(InputError, match="inductor must be True or False, found 'max-autotune'"):
        hocket.parallelize(model(), "tp=2", inductor="max-autotune")  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled_ranks_train_like_eager() -> None:
    eager = model()
    inputs = torch.randn(6, 8)
    ours = copy.deepcopy(eager)
    with hocket.parallelize(ours, "tp=2", (inputs,), tactics=[hocket.TensorParallel("tp")], inductor=True) as parallel:
        assert "compiled regions" in parallel.explain()
        assert "run uncompiled" not in parallel.explain()
        for net in (parallel, eager):
            for _ in range(2):
                net(inputs).square().sum().backward()
        for (name, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
