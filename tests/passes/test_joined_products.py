"""A sum of products becomes one product: proven over the ring, within the bound it states, and only where it was asked for."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from split_support import context, held_by, random_inputs, run
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Phase, Program, RoleKind, note
from hocket.passes.backward_split import BackwardSplit
from hocket.passes.joined_products import JoinProducts

aten = torch.ops.aten


class Loop(nn.Module):
    """A linear cell over time; its weights' gradients are sums over the steps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, steps, width]."""
        h = torch.zeros_like(x[:, 0])
        for step in x.unbind(1):
            h = torch.tanh(self.inner(step) + self.outer(h))
        return h


def captured(rows: int, steps: int, width: int) -> tuple[Program, nn.Module, Tensor]:
    torch.manual_seed(rows + 10 * steps)
    model, x = Loop(width), torch.randn(rows, steps, width)
    return capture(model, (x,)), model, x


def products(program: Program) -> list[str]:
    return [node.name for node in program.nodes if node.target is aten.mm.default and note(node).phase is not Phase.FORWARD]


def test_the_gradient_of_a_weight_used_at_every_step_is_one_product_and_proven() -> None:
    program, _, _ = captured(3, 4, 5)
    joined, (record,) = run_passes(program, (JoinProducts(),), context())
    assert record.applied == 2 + 1  # the third counts the views that are left out first
    assert len(products(program)) - len(products(joined)) == 2 * (4 - 1)
    said = [decision.reason for decision in joined.decisions if decision.by == "join-products"]
    assert all(
        re.match(r"reordered_sum: 4 products of 12 columns joined into one; .* more than 1\.4e-06 times", one) for one in said
    )


def test_products_that_are_large_or_few_stay_apart_and_say_so() -> None:
    program, _, _ = captured(3, 4, 5)
    for options, words in ((JoinProducts(columns=2), "up to 3 columns"), (JoinProducts(least=5), "fewer than 5")):
        kept = options(program, context())
        assert products(kept) == products(program)
        said = [decision for decision in kept.decisions if decision.by == "join-products"]
        assert len(said) == 2
        assert all(words in decision.reason and not decision.applied for decision in said)


def test_a_sum_with_other_terms_is_left_alone() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + (x + 1) @ self.weight + self.weight

    program = capture(Penalised(), (torch.randn(3, 3),))
    joined = JoinProducts()(program, context())
    assert products(joined) == products(program)
    assert not [d for d in joined.decisions if d.by == "join-products"]


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 4), steps=st.integers(2, 5), width=st.integers(1, 5), split=st.booleans())
def test_gradients_differ_within_the_stated_bound(rows: int, steps: int, width: int, *, split: bool) -> None:
    program, model, x = captured(rows, steps, width)
    if split:
        program = BackwardSplit(worth=0)(program, context())
    joined = JoinProducts()(program, context())
    assert sum(decision.applied for decision in joined.decisions if decision.by == "join-products") >= 1
    given_ = held_by(program, model) | random_inputs(program, 1)
    (role,) = (role for role in program.signature.inputs if role.kind is RoleKind.INPUT)
    given_[role] = x
    before, after = run(program, given_), run(joined, given_)
    magnitudes = _absolute(program, given_)
    limit = 2 * rows * steps * 2**-24 / (1 - rows * steps * 2**-24)
    for output, value in before.items():
        if output.kind is RoleKind.GRADIENT and output in magnitudes:
            assert bool(((after[output] - value).abs() <= limit * magnitudes[output] + 1e-30).all())
        else:
            assert torch.equal(after[output], value)


def _absolute(program: Program, given_: dict) -> dict:
    """Sums of the terms' absolute values, for the gradients that are sums of products (transposes looked through)."""

    class Magnitudes(torch.fx.Interpreter):
        found: dict

        def run_node(self, node: torch.fx.Node) -> object:
            result = super().run_node(node)
            if node.target is aten.mm.default:
                left, right = (self.env[arg].double() for arg in node.args)
                self.found[node] = left.abs() @ right.abs()
            elif node.target is aten.add.Tensor and all(arg in self.found for arg in node.args):
                self.found[node] = self.found[node.args[0]] + self.found[node.args[1]]
            elif node.target is aten.t.default and node.args[0] in self.found:
                self.found[node] = self.found[node.args[0]].t()
            return result

    interpreter = Magnitudes(program.graph)
    interpreter.found = {}
    with torch.no_grad():
        interpreter.garbage_collect_values = False
        interpreter.run(*(given_[role] for role in program.signature.inputs))
    pairs = zip(program.signature.outputs, program.results, strict=True)
    return {role: interpreter.found[node] for role, node in pairs if node in interpreter.found}


@pytest.mark.parametrize(("rows", "steps"), list(itertools.product((1, 3), (2, 3))))
def test_a_pass_over_the_result_finds_nothing_more(rows: int, steps: int) -> None:
    program, _, _ = captured(rows, steps, 3)
    once = JoinProducts()(program, context())
    assert products(JoinProducts()(once, context())) == products(once)
