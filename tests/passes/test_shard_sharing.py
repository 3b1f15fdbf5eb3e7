"""A value is brought into a layout once, where it is first needed, and the pass says so."""

import torch
from lowered_programs import collectives, lower, plan_of, program_of

from hocket.compiler.layout import Layout, Partial, Replicate, Shard
from hocket.compiler.program import Phase, annotate, note
from hocket.compiler.verify.shrink import skeleton_difference
from hocket.runtime.mesh import Mesh

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
R, S0, S1, SUM = Replicate(), Shard(0), Shard(1), Partial("sum")
ONE = Mesh.parse("a=2")


def _relu_then(graph, x):
    first = graph.call_function(aten.relu.default, (x,))
    second = graph.call_function(aten.neg.default, (x,))
    return [first, second, x]


def test_consumers_of_the_same_layout_share_one_collective() -> None:
    program = program_of(_relu_then, {"x": (4, 6)})
    nodes = {"x": ((), ((SUM,),)), "relu_default": (((R,),), ((R,),)), "neg_default": (((R,),), ((R,),))}
    lowered = lower(program, plan_of(ONE, nodes, [(R,), (R,), (R,)]))
    (reduce,) = collectives(lowered)
    assert reduce.target is c10d.all_reduce.default
    wait = next(iter(reduce.users))
    assert {user.name for user in wait.users} == {"relu_default", "neg_default", "output"}
    (decision,) = [d for d in lowered.decisions if d.by == "shard"]
    assert decision.applied
    assert decision.source == "model.py:1 relu_default"
    assert "all_reduce over a, P(sum) -> R, 192 bytes a rank: x is needed by relu_default" in decision.reason


def test_a_longer_way_shares_the_steps_that_it_has_in_common() -> None:
    mesh = Mesh.parse("a=2,b=2")
    program = program_of(_relu_then, {"x": (4, 4)})
    layouts: tuple[Layout, Layout] = ((SUM, R), (R, R))
    nodes = {
        "x": ((), ((SUM, SUM),)),
        "relu_default": (((R, R),), ((R, R),)),
        "neg_default": (((S0, R),), ((S0, R),)),
    }
    lowered = lower(program, plan_of(mesh, nodes, [(R, R), (S0, R), (SUM, R)]))
    kinds = [(node.target, node.args[-1]) for node in collectives(lowered)]
    assert kinds == [
        (c10d.all_reduce.default, "b"),  # P,P -> P,R, needed by all three
        (c10d.all_reduce.default, "a"),
        (c10d.reduce_scatter_tensor.default, "a"),
    ], layouts


def test_steps_stand_where_they_are_first_needed_with_the_note_of_their_consumer() -> None:
    program = program_of(_relu_then, {"x": (4, 6)})
    consumer = next(node for node in program.nodes if node.name == "neg_default")
    annotate(consumer, phase=Phase.BACKWARD_INPUT, module="layers.0")
    nodes = {"x": ((), ((S0,),)), "relu_default": (((S0,),), ((S0,),)), "neg_default": (((S1,),), ((S1,),))}
    lowered = lower(program, plan_of(ONE, nodes, [(S0,), (S1,), (S0,)]))
    names = [node.name for node in lowered.nodes]
    assert names.index("relu_default") < names.index("x_all_to_all_a") < names.index("neg_default")
    added = [node for node in lowered.nodes if note(node).added_by]
    assert {note(node).added_by for node in added} == {"shard"}
    assert {note(node).phase for node in added} == {Phase.BACKWARD_INPUT}
    assert {note(node).source for node in added} == {"model.py:1 neg_default"}
    assert all(note(node).origin == "" for node in added)
    kept = [node for node in lowered.nodes if node.op != "output" and not note(node).added_by]
    assert [note(node).origin for node in kept] == ["x", "relu_default", "neg_default"]


def test_signature_roles_and_the_logical_program_are_left_alone() -> None:
    program = program_of(_relu_then, {"x": (4, 6)})
    before = str(program.graph.graph)
    nodes = {"x": ((), ((S0,),)), "relu_default": (((S0,),), ((S0,),)), "neg_default": (((S0,),), ((S0,),))}
    lowered = lower(program, plan_of(ONE, nodes, [(S0,), (S0,), (S0,)]))
    assert str(program.graph.graph) == before
    assert program.mesh is None
    assert lowered.mesh == ONE
    assert lowered.signature == program.signature
    assert [node.name for node in lowered.nodes] == [node.name for node in program.nodes]


def test_lengths_that_happen_to_be_equal_do_not_change_the_lowered_graph() -> None:
    nodes = {
        "x": ((), ((R,),)),
        "y": ((), ((R,),)),
        "relu_default": (((S0,),), ((S0,),)),
        "neg_default": (((S1,),), ((S1,),)),
    }

    def two(graph, x, y):
        return [graph.call_function(aten.relu.default, (x,)), graph.call_function(aten.neg.default, (y,))]

    equal, different = (
        lower(program_of(two, {"x": (4, 6), "y": (4, width)}), plan_of(ONE, nodes, [(S0,), (S1,)])) for width in (4, 8)
    )
    assert not skeleton_difference(equal, different)
