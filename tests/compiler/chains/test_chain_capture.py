"""Recurrent layers and ``hocket.sequential`` as chains: the same values and gradients, proven and run."""

import pytest
import torch
from torch import nn

import hocket
from hocket.compiler.chains.cells import recurrences
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.program import Program
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.verify.lockstep import run_global
from hocket.errors import CaptureError, InputError
from hocket.passes.chain.jacobi import JacobiFeedforward
from hocket.runtime.fixedpoint import decide
from hocket.runtime.mesh import Mesh


class Layers(nn.Module):
    def __init__(self, kind: str, **options: object) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(3, 4, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


class Explicit(nn.Module):
    """A cell of the user's own, with an output beside the state."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside, self.out = nn.Linear(4, 4, bias=False), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        def step(state: torch.Tensor, piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            new = torch.tanh(self.outside(piece) + self.inside(state))
            return new, self.out(new)

        return hocket.sequential(step)(x.new_zeros(x.shape[1], 4), x)


class Unrolled(Explicit):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state, given = x.new_zeros(x.shape[1], 4), []
        for piece in x.unbind(0):
            state = torch.tanh(self.outside(piece) + self.inside(state))
            given.append(self.out(state))
        return state, torch.stack(given)


def context() -> Context:
    return Context(Mesh.parse("one=1"), RuleTable(None), Cluster.current())


def values(model: nn.Module, program: Program) -> dict[object, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    known = dict(model.named_parameters())
    return {
        role: known[role.name].detach() if role.name in known else torch.randn(node.meta["val"].shape, generator=generator)
        for role, node in zip(program.signature.inputs, program.placeholders, strict=True)
    }


def difference(model: nn.Module, plain: Program, chained: Program) -> float:
    given = values(model, plain)
    expected, found = (run_global(p, given, torch.float64).outputs for p in (plain, chained))
    scale = max(float(v.abs().amax()) for v in expected.values() if v is not None)
    return max(float((found[role] - v).abs().amax()) for role, v in expected.items() if v is not None) / scale


CASES = [
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu", "bias": False}),
    ("GRU", {"bias": False}),
    ("GRU", {"bidirectional": True, "batch_first": True}),
    ("LSTM", {"num_layers": 2}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_recurrent_layers_and_their_adjoints_equal_torch_in_float64(kind: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, x = Layers(kind, **options), torch.randn(5, 2, 3)
    plain = hocket.capture(model, (x,))
    with recurrences():
        chained = hocket.capture(model, (x,))
    assert sum("hocket.chain" in str(n.target) for n in chained.nodes) >= 2
    assert difference(model, plain, chained) <= 1e-12
    for solver in ("blocks:2", "jacobi"):
        assert difference(model, plain, JacobiFeedforward(solver)(chained, context())) <= 1e-10


def test_sequential_is_the_plain_loop_outside_a_capture() -> None:
    torch.manual_seed(0)
    model, x = Explicit(), torch.randn(6, 2, 3)
    for a, b in zip(model(x), Unrolled.forward(model, x), strict=True):  # type: ignore[arg-type]
        assert torch.equal(a, b)


def test_sequential_is_one_node_with_the_loops_values_and_gradients() -> None:
    torch.manual_seed(0)
    model, x = Explicit(), torch.randn(6, 2, 3)
    chained = hocket.capture(model, (x,))
    assert sum("hocket.chain" in str(n.target) for n in chained.nodes) == 2  # forward and adjoint
    unrolled = Unrolled()
    unrolled.load_state_dict(model.state_dict())
    plain = hocket.capture(unrolled, (x,))
    assert difference(model, plain, chained) <= 1e-10
    split = JacobiFeedforward("jacobi")(chained, context())
    assert difference(model, plain, split) <= 1e-10
    assert any("sums taken after it" in d.reason for d in split.decisions)


def test_unrolled_loops_are_found_forward_and_backward() -> None:
    torch.manual_seed(0)
    model, x = Unrolled(), torch.randn(28, 2, 3)
    plain = hocket.capture(model, (x,))
    lifted = JacobiFeedforward("blocks:8", shortest=20)(plain, context())
    applied = [d for d in lifted.decisions if d.by == "jacobi" and d.applied]
    assert len(applied) == 2
    assert "sums taken after it; steps folded into rows" in applied[1].reason
    assert difference(model, plain, lifted) <= 1e-10


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda h, x: (h + torch.rand_like(h), h), "random numbers"),
        (lambda h, x: (h.sum(), h), "keeps its"),
        (lambda h, x: h, "next state, output"),
    ],
)
def test_steps_that_cannot_be_one_node_are_refused(step: object, message: str) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return hocket.sequential(step)(x[0], x)[1]  # type: ignore[arg-type]

    with pytest.raises((CaptureError, InputError), match=message):
        hocket.capture(model, (torch.randn(4, 2),), train=False)


def test_sequences_of_different_lengths_are_refused() -> None:
    with pytest.raises(InputError, match="same first dimension"):
        hocket.sequential(lambda h, x: (h, h))(torch.zeros(2), (torch.zeros(3, 2), torch.zeros(4, 2)))


def test_jacobi_trains_a_recurrent_layer_as_torch_does() -> None:
    decide.forget()
    torch.manual_seed(0)
    model, x = nn.RNN(3, 8), torch.randn(96, 1, 3)
    expected = model(x)[0]
    expected.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    with hocket.parallelize(model, "tp=1", (x,), tactics=[hocket.Jacobi("blocks:16")], engine="sim") as parallel:
        assert "jacobi" in str(parallel.explain())
        for _ in range(2):
            parallel.zero_grad()
            found = parallel(x)[0]
            found.square().mean().backward()
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
            for name, p in parallel.named_parameters():
                torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_jacobi_refuses_unknown_solvers() -> None:
    with pytest.raises(InputError, match="expected a solver"):
        hocket.Jacobi("picard")


def test_chains_run_whole_on_every_rank_in_the_same_way() -> None:
    torch.manual_seed(0)
    model, x = nn.GRU(3, 4), torch.randn(64, 2, 3)
    with torch.no_grad(), hocket.parallelize(model, "dp=2", (x,), tactics=[hocket.Jacobi()], engine="sim") as parallel:
        assert "blocks:32" in str(parallel.explain())
        torch.testing.assert_close(parallel(x)[0], model(x)[0], rtol=0, atol=2e-6)
