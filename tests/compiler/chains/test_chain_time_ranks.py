"""Recurrences cut in time over ranks: proven, and run by every engine with torch's values and gradients."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hocket
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.rules.table import RuleTable
from hocket.errors import InputError, PlanError
from hocket.passes.chain.jacobi import JacobiFeedforward
from hocket.runtime.mesh import Mesh

SCRIPT = Path(__file__).with_name("time_ranks_script.py")


class Reader(nn.Module):
    """A recurrent layer and what reads it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn, self.out = getattr(nn, kind)(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.rnn(x)[0])


def compare(kind: str, steps: int, mesh: str, engine: str, verify: str) -> str:
    """Values and gradients beside torch's; what the report says."""
    torch.manual_seed(0)
    model, x = Reader(kind), torch.randn(steps, 2, 3)
    expected = model(x)
    expected.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    tactics = [hocket.Jacobi(axis="t")]
    with hocket.parallelize(model, mesh, (x,), tactics=tactics, engine=engine, verify=verify) as parallel:
        for _ in range(2):
            parallel.zero_grad()
            found = parallel(x)
            found.square().mean().backward()
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
            for name, p in parallel.named_parameters():
                torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)
        return str(parallel.explain())


def test_a_layer_cut_over_two_ranks_is_proven_and_trains_as_torch_does() -> None:
    said = compare("RNN", 24, "t=2", "sim", "ring")
    assert said.count("segments of 12 steps") == 2
    assert said.count("proved") == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize(("steps", "ranks"), [(25, 2), (31, 3), (40, 4)])
def test_uneven_lengths_on_two_to_four_ranks_are_proven_and_train_as_torch_does(kind: str, steps: int, ranks: int) -> None:
    assert "exact after" in compare(kind, steps, f"t={ranks}", "sim", "ring")


def test_processes_cut_in_time_train_as_torch_does() -> None:
    compare("RNN", 25, "t=2", "local", "off")


@pytest.mark.slow
def test_attached_ranks_cut_in_time_follow_eager() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("equal") == 2


def test_the_chain_is_cut_even_where_the_planner_would_not() -> None:
    model, x = nn.RNN(3, 4), torch.randn(24, 2, 3)
    tactics = [hocket.Jacobi(axis="t")]
    with torch.no_grad(), hocket.parallelize(model, "t=2", (x,), tactics=tactics, engine="sim", verify="types") as parallel:
        parallel(x)
        chains = [p for name, p in parallel.plan.nodes.items() if name.startswith(("chain", "resume"))]
        assert [str(p.outputs[0]) for p in chains] == ["(Shard(dim=0),)"] * 2


def test_an_axis_that_the_mesh_does_not_have_is_refused() -> None:
    model, x = nn.RNN(3, 4), torch.randn(24, 2, 3)
    with pytest.raises((InputError, PlanError), match="axis"):
        hocket.parallelize(model, "dp=2", (x,), tactics=[hocket.Jacobi(axis="t")], engine="sim")(x)


def test_rows_of_a_chain_are_sharded_like_a_batch() -> None:
    program = hocket.capture(nn.RNN(3, 4), (torch.randn(24, 6, 3),), train=False)
    table = RuleTable(None)
    split = JacobiFeedforward("sequential", shortest=8)(program, Context(Mesh.parse("one=1"), table, Cluster.current()))
    (node,) = [n for n in split.nodes if "hocket.chain" in str(n.target)]
    (whole, rule) = table.rules(node, 2)
    assert whole.is_replicate
    assert "S(0)" in str(rule)
    assert "S(1)" in str(rule)
    assert rule.origin == "hocket:chain"
