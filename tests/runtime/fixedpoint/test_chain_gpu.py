"""Chains on a CUDA device: every solver ends at the loop's values, and torch's kernel is cuDNN's."""

import pytest
import torch
from test_chain_native import layer, run

from hocket.runtime.fixedpoint import decide
from hocket.runtime.fixedpoint.how import How
from hocket.runtime.fixedpoint.known import LOOP, NATIVE
from hocket.runtime.fixedpoint.steps import Chain

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def chain() -> Chain:
    plain = layer(200, 1)
    groups = [[t.cuda() for t in group] for group in (plain.init, plain.shared, plain.streams)]
    return Chain(plain.body, *groups, plain.count)


@pytest.mark.parametrize("solver", ["sequential", "jacobi", "blocks:16", "windows:16", "shooting:16", "newton", "auto"])
def test_every_solver_ends_at_the_loops_values(chain: Chain, solver: str) -> None:
    plain = layer(200, 1)
    expected = run(plain, How("sequential"))
    for found, value in zip(run(chain, How.parse(solver)), expected, strict=True):
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), value, rtol=0, atol=1e-11)


@pytest.mark.parametrize("contender", [LOOP, NATIVE, 32])
def test_whoever_runs_the_results_are_the_layers(chain: Chain, contender: int) -> None:
    decide.forget()
    how = How("auto", native="rnn_tanh")
    known = decide.knowledge(chain, how)
    known.window, known.merge, known.warm, known.is_measured = contender, 40.0, 32, True
    expected = run(layer(200, 1), How("sequential"))
    for found, value in zip(run(chain, how), expected, strict=True):
        torch.testing.assert_close(found.cpu(), value, rtol=0, atol=1e-11)
