"""Recurrent layers of torch stay whole where nobody differentiates them, so that torch's kernel is among what is tried."""

import json

import pytest
import torch
from torch import nn

import hocket
from hocket.compiler.chains.cells import recurrences
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.program import Program, copy_program
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.verify.lockstep import run_global
from hocket.compiler.verify.ring.compare import compare
from hocket.compiler.verify.ring.verdict import Status
from hocket.passes.chain.jacobi import JacobiFeedforward
from hocket.runtime.fixedpoint import decide
from hocket.runtime.fixedpoint.report import RECENT
from hocket.runtime.mesh import Mesh


@pytest.fixture(autouse=True)
def _measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOCKET_CHAINS", "off")
    decide.forget()


def chained(layer: nn.Module, x: torch.Tensor, *, train: bool = False, ranks: int = 1, solver: str = "auto") -> Program:
    """A layer after the pass."""
    with recurrences():
        program = hocket.capture(layer, (x,), train=train)
    return JacobiFeedforward(solver)(program, Context(Mesh.parse(f"one={ranks}"), RuleTable(None), Cluster.current()))


def layers_of(program: Program) -> list[str]:
    return [json.loads(str(n.args[-1]))["native"] for n in program.nodes if "hocket.chain" in str(n.target)]


CASES = [
    ("RNN", {}, "rnn_tanh"),
    ("RNN", {"nonlinearity": "relu", "bias": False}, "rnn_relu"),
    ("GRU", {"bidirectional": True, "batch_first": True}, "gru"),
    ("LSTM", {"num_layers": 2, "bias": False}, "lstm"),
    ("LSTM", {}, "lstm"),
]


@pytest.mark.parametrize(("kind", "options", "name"), CASES)
def test_layers_kept_whole_are_proven_and_equal_torchs_in_float64(kind: str, options: dict[str, object], name: str) -> None:
    torch.manual_seed(0)
    layer, x = getattr(nn, kind)(3, 4, **options), torch.randn(5, 2, 3)
    plain, whole = hocket.capture(layer, (x,), train=False), chained(layer, x)
    assert set(layers_of(whole)) == {name}
    assert compare(plain, whole).status is Status.EQUAL
    known = dict(layer.named_parameters())
    given = {role: known.get(role.name, x).detach() for role in plain.signature.inputs}
    expected, found = (run_global(program, given, torch.float64).outputs for program in (plain, whole))
    for role, value in expected.items():
        torch.testing.assert_close(found[role], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("said", "kind", "reason"),
    [("rnn_relu", "RNN", "says that it is torch's rnn_relu"), ("rnn_tanh", "GRU", "cannot be executed: mat1 and mat2")],
)
def test_a_chain_that_names_another_layer_is_refused_by_the_proof(said: str, kind: str, reason: str) -> None:
    layer, x = getattr(nn, kind)(3, 4), torch.randn(5, 2, 3)
    plain = hocket.capture(layer, (x,), train=False)
    wrong, _ = copy_program(chained(layer, x))
    (node,) = [n for n in wrong.nodes if "hocket.chain" in str(n.target)]
    how = json.loads(str(node.args[-1])) | {"native": said}
    node.args = (*node.args[:-1], json.dumps(how, sort_keys=True))
    verdict = compare(plain, wrong)
    assert verdict.status is Status.DIFFERENT
    assert reason in verdict.reason


@pytest.mark.parametrize(
    "options", [{"train": True}, {"ranks": 2}, {"solver": "blocks:8"}], ids=["gradients", "several ranks", "a solver asked for"]
)
def test_elsewhere_layers_are_split(options: dict[str, object]) -> None:
    program = chained(nn.GRU(3, 4), torch.randn(40, 2, 3), **options)  # type: ignore[arg-type]
    assert set(layers_of(program)) == {""}
    assert all("more hoisted" in d.reason for d in program.decisions if d.by == "jacobi" and d.applied)


def test_a_short_gru_runs_on_torchs_kernel_where_that_is_faster_and_explain_says_that_it_is_tried() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 4), torch.randn(12, 2, 3)
    with torch.no_grad(), hocket.parallelize(layer, "one=1", (x,), tactics=[hocket.Jacobi()], engine="sim") as parallel:
        assert "torch's own gru" in " ".join(str(parallel.explain()).split())
        for _ in range(decide.SETTLING + 1):
            torch.testing.assert_close(parallel(x)[0], layer(x)[0], rtol=0, atol=2e-6)
    assert RECENT[-1].solver in ("torch.gru", "sequential")
