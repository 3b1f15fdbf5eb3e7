"""The counter-based generator: distribution, independence, and the same mask in forward, backward and recomputation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from capture_reference import interpret, random_tangents, values_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from hocket.compiler.capture import capture
from hocket.compiler.capture.counter_random import CounterRandom, element_index, mix
from hocket.compiler.errors import CaptureError
from hocket.compiler.program import Program, RoleKind

COUNT = 1 << 18


def draws(seed: int = 5) -> CounterRandom:
    return CounterRandom(lambda: torch.tensor(seed))


def run(program: Program, x: torch.Tensor, seed: int, tangent: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    values = values_of(program, None, (x,), {}, {"out": tangent} if tangent is not None else {})
    kinds = [role.kind for role in program.signature.inputs]
    values[kinds.index(RoleKind.SEED)] = torch.tensor(seed)
    return {f"{role.kind}:{role.name}": value for role, value in interpret(program, values).items()}


def test_mix_is_splitmix64() -> None:
    """The reference outputs of splitmix64 for seed 1234567."""
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    state = torch.tensor(1234567) + golden * torch.arange(1, 6)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [value % (1 << 64) for value in mix(state).tolist()] == expected


def test_element_index_is_row_major() -> None:
    assert torch.equal(element_index((2, 3, 4), torch.device("cpu")), torch.arange(24).view(2, 3, 4))
    assert element_index((), torch.device("cpu")).shape == ()
    assert element_index((0, 3), torch.device("cpu")).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_uniform_numbers_are_uniform(dtype: torch.dtype) -> None:
    sample = draws().uniform((COUNT,), dtype, torch.device("cpu")).double()
    assert sample.min() >= 0
    assert sample.max() < 1
    counts = torch.histc(sample, 64, 0, 1)
    chi_square = ((counts - COUNT / 64) ** 2 / (COUNT / 64)).sum()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)


def test_neighbours_ops_and_seeds_are_independent() -> None:
    source, other = draws(5), draws(6)
    first, second, third = (r.uniform((COUNT,), torch.float64, torch.device("cpu")) for r in (source, source, other))
    for a, b in ((first[1:], first[:-1]), (first[1024:], first[:-1024]), (first, second), (first, third)):
        correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(COUNT)
    assert len(torch.unique(draws().bits((COUNT,), torch.device("cpu")))) == COUNT


def test_normal_numbers_have_normal_moments() -> None:
    sample = draws().normal((COUNT,), torch.float64, torch.device("cpu"))
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt(math.prod(range(1, 4 * power, 2)) / COUNT)
        assert abs((sample**power).mean() - expected) < 5 * spread


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_rate_and_uses_one_mask_in_both_directions(rate: float) -> None:
    x = torch.ones(256, 256, requires_grad=True)
    program = capture(lambda x: F.dropout(x, rate), (x,))
    tangent = torch.full((256, 256), 2.0)
    found = run(program, x, 3, tangent)
    y, gradient = found["output:out"], found["gradient:args[0]"]
    kept = (y != 0).double().mean()
    assert abs(kept - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / y.numel())
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - rate)))
    torch.testing.assert_close(gradient, 2 * y)


def test_the_seed_decides_the_numbers() -> None:
    x = torch.zeros(64)
    program = capture(lambda x: x + torch.rand_like(x), (x,), train=False)
    one, again, two = run(program, x, 1), run(program, x, 1), run(program, x, 2)
    assert torch.equal(one["output:out"], again["output:out"])
    assert not torch.equal(one["output:out"], two["output:out"])


def test_a_slice_of_the_index_draws_a_slice_of_the_numbers() -> None:
    """What a sharded program relies on: an element's number depends on its global index alone."""
    whole = draws().bits((8, 6), torch.device("cpu"))
    key = mix(torch.tensor(5) + (0x9E3779B97F4A7C15 - (1 << 64)))
    index = element_index((8, 6), torch.device("cpu"))[4:, 2:5]
    assert torch.equal(mix(index * (0x9E3779B97F4A7C15 - (1 << 64)) + key), whole[4:, 2:5])


def test_recomputation_repeats_the_mask() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.checkpointed:
                return checkpoint(lambda t: F.dropout(self.linear(t).tanh(), 0.5).sin(), x, use_reentrant=False)
            return F.dropout(self.linear(x).tanh(), 0.5).sin()

    model, x, results = Model(), torch.randn(4, 16), []
    for model.checkpointed in (False, True):
        program = capture(model, (x,))
        found = interpret(program, values_of(program, model, (x,), {}, random_tangents(program)))
        results.append(list(found.values()))
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.bernoulli(x.sigmoid()),
        lambda x: torch.bernoulli(x, 0.3),
        lambda x: torch.randn_like(x),
        lambda x: torch.randn(4, 8),
        lambda x: torch.rand(4, 8),
        lambda x: torch.randint(0, 10, (4, 8)) + x,
        lambda x: torch.randint_like(x, 3, 9),
        lambda x: torch.normal(x, 2.0),
        lambda x: torch.normal(0.0, 1.0, (4, 8)),
        lambda x: torch.empty_like(x).uniform_(-1, 1),
        lambda x: torch.empty_like(x).normal_(1, 2),
        lambda x: torch.empty_like(x).exponential_(2.0),
        lambda x: torch.empty_like(x).random_(3, 7),
        lambda x: F.gumbel_softmax(x),
        lambda x: F.dropout2d(x.view(1, 4, 8, 1), 0.5),
        lambda x: F.alpha_dropout(x, 0.5),
        lambda x: F.rrelu(x, training=False),
        lambda x: F.rrelu(x, training=True),
    ],
)
def test_every_rewritten_op_has_the_moments_of_torchs_own(draw) -> None:
    x = torch.linspace(-2, 2, 32).view(4, 8)
    program = capture(lambda x: draw(x) + 0 * x.sum(), (x,), train=False)
    has_seed = bool(program.signature.inputs_of(RoleKind.SEED))
    assert all(torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()) for node in program.nodes)
    if not has_seed:
        torch.testing.assert_close(interpret(program, values_of(program, None, (x,), {}, {})).popitem()[1], draw(x))
        return
    ours = torch.stack([run(program, x, seed)["output:out"] for seed in range(300)]).double()
    torch.manual_seed(0)
    theirs = torch.stack([draw(x) for _ in range(300)]).double()
    assert ours.shape == theirs.shape
    deviation = 5 * theirs.std() / math.sqrt(theirs[0].numel() * 300) * 2**0.5 + 1e-9
    assert abs(ours.mean() - theirs.mean()) < 3 * deviation
    assert abs(ours.std() - theirs.std()) < 0.05 * theirs.std() + 1e-9


@pytest.mark.parametrize(
    "draw", [lambda x: x.softmax(-1).multinomial(2), lambda x: x[torch.randperm(4)], lambda x: torch.poisson(x.abs())]
)
def test_ops_that_cannot_be_made_so_are_refused(draw) -> None:
    with pytest.raises(CaptureError, match="draw them outside the model"):
        capture(draw, (torch.randn(4, 8),), train=False)


def test_a_generator_of_the_users_own_is_refused() -> None:
    generator = torch.Generator()
    with pytest.raises(CaptureError, match="leave `generator` out"):
        capture(lambda x: x + torch.rand(4, 8, generator=generator), (torch.randn(4, 8),), train=False)
