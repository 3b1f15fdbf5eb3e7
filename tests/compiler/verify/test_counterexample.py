"""A difference is shown as the smallest piece that differs, with the relation of what was found to what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from rich.console import Console
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.program import Program, annotate, copy_program, note
from hocket.compiler.verify.counterexample import counterexample
from hocket.compiler.verify.levels import Question, ask, ring_level
from hocket.compiler.verify.report import Status

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down(torch.tanh(self.up(x)))).square().mean()


Edit = Callable[[fx.Graph, fx.Node], fx.Node]


def program() -> Program:
    torch.manual_seed(0)
    return capture(Net(), (torch.randn(3, 4),))


def edited(before: Program, target: object, edit: Edit) -> Program:
    """The first node of this op, replaced by what ``edit`` makes."""
    after, mapping = copy_program(before)
    for old, node in mapping.items():
        if node.op == "call_function":
            annotate(node, origin=old.name)
    graph = after.graph.graph
    node = next(n for n in graph.nodes if n.target is target)
    with graph.inserting_after(node):
        made = edit(graph, node)
    for new in graph.nodes:
        if "val" not in new.meta:
            new.meta.update(node.meta)
            annotate(new, origin="")
    annotate(made, origin=note(node).origin)
    annotate(node, origin="")
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made and user not in made.all_input_nodes)
    return after


def without_bias(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.mm.default, node.args[1:])


def doubled(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.add.Tensor, (node, node))


def halved(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.div.Tensor, (node, 2))


def negated(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.neg.default, (node,))


def slightly_larger(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(aten.mul.Tensor, (node, 1.001))


@pytest.mark.parametrize(
    ("edit", "relation"),
    [
        (without_bias, "lacks the term param_up_bias of"),
        (doubled, "is 2 x"),
        (halved, "is 1/2 of"),
        (negated, "is minus"),
        (slightly_larger, "has no simple relation to"),
    ],
)
def test_the_relation_to_the_expected_value_is_named(edit: Edit, relation: str) -> None:
    before = program()
    found = counterexample(before, edited(before, aten.addmm.default, edit))
    assert found is not None
    assert (found.original, found.relation) == ("addmm", relation)
    assert len(found.found) <= 3
    assert found.entries == (18, 18)
    assert found.effect > 1e-4
    assert all("test_counterexample.py" in source for source in found.sources)


def test_the_piece_is_the_first_that_differs_and_the_effect_is_measured_in_float64() -> None:
    before = program()
    found = counterexample(before, edited(before, aten.tanh.default, slightly_larger))
    assert found is not None
    assert found.original == "tanh"
    assert found.inputs == {"tanh": (3, 6)}
    assert found.effect == pytest.approx(1e-3, rel=1e-6)
    assert found.values[1] == pytest.approx(1.001 * found.values[0])


def test_equal_programs_have_none() -> None:
    before = program()
    assert (
        counterexample(
            before, edited(before, aten.tanh.default, lambda graph, node: graph.call_function(aten.clone.default, (node,)))
        )
        is None
    )


def test_a_verdict_shows_it_in_text_on_the_console_and_as_json() -> None:
    before = program()
    verdict = ask(Question(before, edited(before, aten.addmm.default, without_bias)), (ring_level,))
    assert verdict.status is Status.DIFFERENT
    assert "lacks the term param_up_bias" in str(verdict)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(verdict)
    assert "smallest piece that differs" in console.export_text()
    facts = json.loads(verdict.to_json())
    assert facts["counterexample"]["relation"] == "lacks the term param_up_bias of"
    assert facts["counterexample"]["entries"] == [18, 18]
