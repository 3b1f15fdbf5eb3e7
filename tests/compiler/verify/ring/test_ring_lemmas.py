"""Programs are proven equal by what they share and by lemmas about the rest; nothing that is not so is shared or lemma."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.program import NOTE, Note, Program, Role, RoleKind, Signature, annotate, copy_program, graph_module, note
from hocket.compiler.verify.forms import TensorForm, form_of, freeze, infer
from hocket.compiler.verify.levels import Question, ask, ring_level
from hocket.compiler.verify.report import Status
from hocket.compiler.verify.ring.lemmas import congruence
from hocket.compiler.verify.ring.numbering import Numbering

aten = torch.ops.aten


class Blocks(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


def blocks(layers: int = 4) -> Program:
    torch.manual_seed(0)
    return capture(Blocks(layers), (torch.randn(3, 4),))


def in_two_halves(program: Program, wrong_at: int = -1) -> Program:
    """Every x w + b with the inner dimension in two halves; the one at ``wrong_at`` forgets its bias."""
    new, mapping = copy_program(program)
    for old, node in mapping.items():
        if node.op == "call_function":
            annotate(node, origin=old.name)
    graph = new.graph.graph
    for count, node in enumerate(n for n in list(graph.nodes) if n.target is aten.addmm.default):
        bias, x, weight = node.args
        half, size = x.meta["val"].shape[1] // 2, x.meta["val"].shape[1]

        def call(target: object, *args: object, like: fx.Node = node) -> fx.Node:
            made = graph.call_function(target, args)
            made.meta.update(like.meta)
            annotate(made, origin="")
            return made

        with graph.inserting_before(node):
            parts = [
                call(aten.mm.default, call(aten.slice.Tensor, x, 1, a, b), call(aten.slice.Tensor, weight, 0, a, b))
                for a, b in ((0, half), (half, size))
            ]
            total = call(aten.add.Tensor, *parts)
            if count != wrong_at:
                total = call(aten.add.Tensor, total, bias)
            annotate(total, origin=note(node).origin)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
    return new


def test_the_same_program_is_equal_with_certainty() -> None:
    program = blocks()
    found = congruence(program, copy_program(program)[0])
    assert found.equal
    assert found.lemmas == 0
    assert found.bound.probability == 0
    assert found.bound.rigorous


@pytest.mark.parametrize("layers", [2, 6])
def test_a_rewrite_of_every_block_takes_one_lemma_for_each_of_its_forms(layers: int) -> None:
    program = blocks(layers)
    found = congruence(program, in_two_halves(program))
    assert found.equal
    assert (found.lemmas, found.uses) == (2, 2 * layers)
    assert 0 < found.bound.probability < 1e-9


@pytest.mark.parametrize("wrong_at", [0, 5, 7])
def test_one_wrong_copy_of_a_block_is_not_covered_by_the_lemma_of_the_others(wrong_at: int) -> None:
    program = blocks()
    wrong = in_two_halves(program, wrong_at)
    assert not congruence(program, wrong).equal
    assert ask(Question(program, wrong), (ring_level,)).status is Status.DIFFERENT


def test_shapes_that_a_pass_forgot_to_update_are_not_believed() -> None:
    program = capture(lambda x: x.view(6, 4).sum(0), (torch.randn(4, 6),), train=False)
    wrong, _ = copy_program(program)
    view = next(node for node in wrong.nodes if node.target is aten.view.default)
    view.args = (view.args[0], [4, 6])
    assert not congruence(program, wrong).equal


def test_a_constant_of_the_same_name_is_not_the_same_constant() -> None:
    table = torch.arange(4.0)
    program = capture(lambda x: x * table, (torch.randn(4),), train=False)
    assert any(role.kind is RoleKind.CONSTANT for role in program.signature.inputs)
    changed = program.replace(constants={name: value + 1 for name, value in program.constants.items()})
    assert congruence(program, program).equal
    assert not congruence(program, changed).equal
    assert ask(Question(program, changed), (ring_level,)).status is Status.DIFFERENT


def program_of(function: Callable[[fx.Graph, fx.Node], fx.Node], *, claim: str = "value") -> Program:
    """A program of one [3, 4] input; the last node claims to be the node of that name."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    result = function(graph, x)
    graph.output((result,))
    for node in graph.nodes:
        node.meta[NOTE] = Note(origin=claim if node is result else "")
        node.meta["val"] = torch.empty(3, 4, device="meta")
    signature = Signature((Role(RoleKind.INPUT, "x"),), (Role(RoleKind.OUTPUT, "y"),))
    return Program(graph_module(graph), signature)


def masked_exponential(graph: fx.Graph, x: fx.Node) -> fx.Node:
    mask = graph.call_function(aten.triu.default, (graph.call_function(aten.ones.default, ([3, 4],), {"dtype": torch.bool}), 1))
    filled = graph.create_node("call_function", aten.masked_fill.Scalar, (x, mask, -float("inf")), name="filled")
    return graph.create_node("call_function", aten.exp.default, (filled,), name="value")


def test_no_lemma_is_about_any_value_where_a_mask_put_minus_infinity() -> None:
    def special(graph: fx.Graph, x: fx.Node) -> fx.Node:
        right = masked_exponential(graph, x)
        infinite = graph.call_function(aten.eq.Scalar, (right.args[0], -float("inf")))
        return graph.call_function(aten.where.ScalarSelf, (infinite, 5.0, right))

    assert congruence(program_of(masked_exponential), program_of(masked_exponential)).equal
    assert not congruence(program_of(masked_exponential), program_of(special)).equal


def test_no_lemma_divides_by_a_value_that_a_mask_made_zero() -> None:
    def divided(graph: fx.Graph, x: fx.Node) -> fx.Node:
        right = masked_exponential(graph, x)
        return graph.call_function(aten.div.Tensor, (graph.call_function(aten.mul.Tensor, (right, right)), right))

    def doubled(graph: fx.Graph, x: fx.Node) -> fx.Node:
        right = masked_exponential(graph, x)
        return graph.call_function(aten.sub.Tensor, (graph.call_function(aten.add.Tensor, (right, right)), right))

    assert not congruence(program_of(masked_exponential), program_of(divided)).equal
    assert congruence(program_of(masked_exponential), program_of(doubled)).equal


def test_an_op_without_meaning_is_not_called_equal_for_being_in_both() -> None:
    def strange(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(aten.special_bessel_j0.default, (x,))

    found = congruence(program_of(strange), program_of(strange))
    assert not found.equal
    assert "special_bessel_j0" in found.unsupported
    assert ask(Question(program_of(strange), program_of(strange)), (ring_level,)).status is Status.UNSUPPORTED


def test_random_numbers_drawn_twice_are_two_values() -> None:
    table = Numbering()
    program = program_of(lambda graph, x: graph.call_function(aten.rand_like.default, (x,)))
    numbers = [
        table.enter(one)[one.nodes[1]] for one in (program, program_of(lambda g, x: g.call_function(aten.rand_like.default, (x,))))
    ]
    assert numbers[0] != numbers[1]


def test_attention_draws_random_numbers_only_with_dropout() -> None:
    op = aten._scaled_dot_product_flash_attention_for_cpu.default
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(1, 2, 3, 4)
    table = Numbering()
    numbers = {x: table.input(x, Role(RoleKind.INPUT, "x"), blocks(1))}
    plain = [table.number(graph.call_function(op, (x, x, x, 0.0, True), kw), numbers) for kw in ({}, {"scale": None})]
    assert plain[0] == plain[1]
    assert type(table.form(plain[0])) is tuple
    dropped = [table.number(graph.call_function(op, (x, x, x, 0.5, True)), numbers) for _ in range(2)]
    assert dropped[0] != dropped[1]


def test_keyword_arguments_tell_calls_apart_unless_they_are_the_default() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(6, 4)
    table = Numbering()
    numbers = {x: table.input(x, Role(RoleKind.INPUT, "x"), blocks(1))}
    given_ = [{}, {"step": 1}, {"step": 2}, {"step": 3}]
    found = [table.number(graph.call_function(aten.slice.Tensor, (x, 0, 0, 5), kwargs), numbers) for kwargs in given_]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    sums = [table.number(graph.call_function(aten.sum.dim_IntList, (x, [0]), k), numbers) for k in ({}, {"keepdim": True})]
    assert sums[0] != sums[1]


ARGUMENTS = st.recursive(
    st.one_of(st.integers(-2, 2), st.sampled_from([0.0, -0.0, 1.0, 2.0]), st.booleans(), st.none(), st.text("ab", max_size=2)),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=200)
@given(ARGUMENTS, ARGUMENTS)
def test_different_arguments_have_different_keys(first: object, second: object) -> None:
    keys = [freeze(one, lambda node: node) for one in (first, second)]
    assert (keys[0] == keys[1]) == (repr(first) == repr(second))


VIEWS = {
    "slice": st.tuples(st.integers(-1, 1), st.integers(-8, 8), st.integers(-8, 8), st.integers(1, 3)),
    "permute": st.permutations([0, 1]),
}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.one_of(*[st.tuples(st.just(name), given_) for name, given_ in VIEWS.items()]), min_size=1, max_size=4), st.data()
)
def test_views_with_one_number_are_one_tensor(chain: list[tuple[str, object]], data: st.DataObject) -> None:
    """Whatever the table simplifies: evaluating its calls gives what the views give."""
    value = torch.arange(30.0).reshape(5, 6)
    graph = fx.Graph()
    made = graph.placeholder("x")
    expected = value
    for name, how in chain:
        if name == "slice":
            call = (aten.slice.Tensor, (made, *how))
        elif data.draw(st.booleans()):
            call = (aten.permute.default, (made, list(how)))
        else:
            call = (aten.reshape.default, (made, list(reversed(expected.shape))))
        made = graph.call_function(*call)
        expected = call[0](expected, *call[1][1:])
    table = Numbering()
    first = next(iter(graph.nodes))
    first.meta["val"] = value
    numbers = {first: table.input(first, Role(RoleKind.INPUT, "x"), blocks(1))}
    for node in list(graph.nodes)[1:]:
        numbers[node] = table.number(node, numbers)
    found = [value]
    for call in table.calls[1:]:
        source, *rest = call.args
        found.append(call.target(found[source], *rest))
    assert torch.equal(found[numbers[made]], expected)
    assert table.form(numbers[made]) == form_of(expected)


def test_forms_are_those_of_the_op_or_unknown() -> None:
    a, b = TensorForm((2, 3), torch.float32), TensorForm((3, 5), torch.float32)
    assert infer(aten.mm.default, (a, b), ()) == TensorForm((2, 5), torch.float32)
    assert repr(infer(aten.mm.default, (b, a), ())) == "unknown form"
    assert infer(operator.add, (2, 3), ()) == 5
