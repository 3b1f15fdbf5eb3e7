import operator

import pytest
import torch
import torch.fx as fx
from torch._subclasses import FakeTensorMode

from hocket.compiler.emit import emit
from hocket.compiler.layout import Shard, coordinate, local_offset, local_size, padded_size, padding
from hocket.compiler.program import NOTE, Note, Phase, Program, Role, RoleKind, Signature, annotate, note
from hocket.runtime.errors import ProgramError
from hocket.runtime.mesh import Mesh

ATEN, C10D = torch.ops.aten, torch.ops._c10d_functional
MODE = FakeTensorMode()


class Maker:
    """A logical graph, one call at a time."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs, self.outputs, self.results = [], [], []

    def input(self, kind, name, *shape):
        node = self.graph.placeholder(f"p{len(self.inputs)}")
        self.inputs.append(Role(RoleKind(kind), name))
        with MODE:
            node.meta.update({"val": torch.empty(shape), NOTE: Note(source=f"in.py:{len(self.inputs)}")})
        return node

    def op(self, target, *args, phase=Phase.FORWARD, source="m.py:1 f(x)", **kwargs):
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with MODE:
            value = 0 if target in (coordinate,) else target(*values[0], **values[1])
        node.meta.update({"val": value, NOTE: Note(phase=phase, source=source)})
        return node

    def output(self, kind, name, node):
        self.outputs.append(Role(RoleKind(kind), name))
        self.results.append(node)

    def program(self, **fields) -> Program:
        self.graph.output(tuple(self.results))
        module = fx.GraphModule(torch.nn.Module(), self.graph)
        return Program(module, Signature(tuple(self.inputs), tuple(self.outputs)), **fields)


def ops(program, name):
    segment = program.segment(name)
    return [ins.op.split(".")[1] for ins in program.instructions[segment.start : segment.stop]]


def test_a_program_without_tangents_is_one_segment_named_by_what_it_does():
    for kind, name in (("output", "forward"), ("gradient", "step")):
        m = Maker()
        x = m.input("input", "x", 2)
        m.output(kind, "x", m.op(ATEN.neg.default, x))
        assert [s.name for s in emit(m.program()).segments] == [name]
    m = Maker()
    x = m.input("param", "x", 2)
    m.output("update", "x", m.op(ATEN.neg.default, x, phase=Phase.OPTIMIZER))
    assert [s.name for s in emit(m.program()).segments] == ["step"]


def test_recomputation_runs_in_the_backward_although_it_reads_no_tangent():
    m = Maker()
    back = Phase.BACKWARD_INPUT
    x, t = m.input("input", "x", 2), m.input("tangent", "y", 2)
    m.output("output", "y", m.op(ATEN.sin.default, m.op(ATEN.exp.default, x)))
    again = m.op(ATEN.exp.default, x, phase=back)
    m.output("gradient", "x", m.op(ATEN.mul.Tensor, m.op(ATEN.cos.default, again, phase=back), t, phase=back))
    program = emit(m.program())
    assert ops(program, "forward") == ["exp", "sin"]
    assert ops(program, "backward") == ["exp", "cos", "mul"]


def test_outputs_and_updates_belong_to_the_forward_and_gradients_to_the_backward():
    m = Maker()
    x, t, b = m.input("input", "x", 2), m.input("tangent", "y", 2), m.input("buffer", "b", 2)
    m.output("gradient", "one", m.op(ATEN.ones_like.default, x))
    m.output("update", "b", m.op(ATEN.add.Tensor, b, x))
    m.output("gradient", "x", m.op(ATEN.mul.Tensor, t, x, phase=Phase.BACKWARD_INPUT))
    m.output("output", "y", m.op(ATEN.neg.default, x))
    m.output("gradient", "none", None)
    m.output("output", "same", x)
    program = emit(m.program())
    assert program.segment_outputs("forward") == (1, 3, 5)
    assert program.segment_outputs("backward") == (0, 2, 4)
    assert program.segment("forward").inputs == (0, 2)
    assert program.segment("backward").inputs == (1,)
    assert program.inputs_read_after("forward") == {0}


def test_what_nobody_needs_is_left_out_and_slots_die_with_their_last_reader():
    m = Maker()
    x = m.input("input", "x", 4)
    m.op(ATEN.exp.default, x)
    split = m.op(ATEN.split.Tensor, x, 2)
    half = m.op(operator.getitem, split, 1)
    m.output("output", "y", m.op(ATEN.neg.default, half))
    program = emit(m.program())
    assert [ins.op for ins in program.instructions] == ["aten.split.Tensor", "aten.neg.default"]
    first, second = program.instructions
    assert (first.outputs, first.spread, first.frees) == ((-1, 1), True, (0,))
    assert (second.frees, program.segments[0].frees) == ((1,), (2,))


def test_locations_are_shared_and_name_the_users_line():
    m = Maker()
    x = m.input("input", "x", 4)
    y = m.op(ATEN.neg.default, m.op(ATEN.exp.default, x, source="a.py:3"), source="a.py:3")
    m.output("output", "y", m.op(ATEN.sin.default, y, source="a.py:9"))
    program = emit(m.program())
    assert program.locations == ("", "a.py:3", "a.py:9")
    assert program.source(2) == "a.py:9"
    assert program.describe(0) == "%1 = aten.exp.default(%0)"


def test_rank_dependent_integers_become_expressions():
    m = Maker()
    x = m.input("input", "x", 8)
    where = m.op(coordinate, "tp")
    size, offset = m.op(local_size, 7, 2, where), m.op(local_offset, 7, 2, where)
    odd = m.op(local_size, 9, 3, 1)
    whole = m.op(padded_size, 7, 2)
    short = m.op(padding, size, 4)
    for i, n in enumerate((size, offset, odd, whole, short)):
        m.output("output", f"y{i}", m.op(ATEN.add.Tensor, x, n))
    program = m.program(mesh=Mesh.parse("tp=2"))
    for node in program.nodes:
        if node.op != "output":
            annotate(node, layouts=((Shard(0),),), global_shapes=((16,),))
    emitted = emit(program)
    assert [ins.args[1] for ins in emitted.instructions] == [
        {"size": [7, "tp"]},
        {"offset": [7, "tp"]},
        {"size": [9, 3, 1]},
        {"padded": [7, 2]},
        {"sub": [4, {"size": [7, "tp"]}]},
    ]


def lowered(shape_known: bool) -> tuple[Program, Program]:
    programs = []
    for rows in (3, 5):
        m = Maker()
        x = m.input("input", "x", rows)
        pair = m.op(ATEN.split.Tensor, x, rows, 0)
        m.output("output", "y", m.op(operator.getitem, pair, 0))
        programs.append(m.program(mesh=Mesh.parse("tp=2") if rows == 3 else None))
    local, logical = programs
    for node in local.nodes:
        if node.op != "output":
            annotate(node, layouts=((Shard(0),),), global_shapes=((5,),) if shape_known else None)
    return local, logical


def test_ports_have_global_shapes_and_layouts_also_behind_getitem():
    for program in (emit(lowered(True)[0]), emit(*lowered(False))):
        for port in (*program.inputs, *program.outputs):
            assert (port.shape, port.layout, port.dtype) == ((5,), ("S(0)",), "float32")


def test_an_unknown_or_wrong_global_shape_is_refused():
    with pytest.raises(ProgramError, match="logical"):
        emit(lowered(False)[0])
    program = lowered(True)[0]
    annotate(program.placeholders[0], global_shapes=((9,),))
    with pytest.raises(ProgramError, match=r"input:x of global shape \(9,\) should be \(5,\) on rank 0, found \(3,\)"):
        emit(program)


def collective_program(*args, wait=True):
    m = Maker()
    x = m.input("input", "x", 4)
    y = m.op(C10D.all_gather_into_tensor.default, x, *args)
    m.output("output", "y", m.op(C10D.wait_tensor.default, y) if wait else y)
    program = m.program(mesh=Mesh.parse("tp=2"))
    annotate(program.placeholders[0], layouts=((Shard(0),),), global_shapes=((8,),))
    annotate(program.results[0], layouts=((Shard(0),),), global_shapes=((16,),))
    return program


@pytest.mark.parametrize(
    ("args", "wait", "message"),
    [((2, "0"), True, "no axis of mesh"), ((3, "tp"), True, "has 2 ranks"), ((2, "tp"), False, "waited for")],
)
def test_collectives_that_do_not_fit_the_mesh_are_refused_with_the_users_line(args, wait, message):
    with pytest.raises(ProgramError, match=rf"{message}.*m\.py:1"):
        emit(collective_program(*args, wait=wait))


def test_a_second_wait_is_the_first_ones_result():
    m = Maker()
    x = m.input("input", "x", 4)
    started = m.op(C10D.all_gather_into_tensor.default, x, 1, "d")
    one, two = m.op(C10D.wait_tensor.default, started), m.op(C10D.wait_tensor.default, started)
    m.output("output", "y", m.op(ATEN.add.Tensor, one, two))
    program = emit(m.program())
    assert [ins.op.split(".")[1] for ins in program.instructions] == ["all_gather_into_tensor", "wait_tensor", "add"]


def test_arguments_that_are_no_data_are_refused():
    m = Maker()
    x = m.input("input", "x", 4)
    node = m.op(ATEN.neg.default, x)
    m.output("output", "y", node)
    program = m.program()
    node.args = (x, object())
    with pytest.raises(ProgramError, match=r"type object.*m\.py:1"):
        emit(program)
    assert note(node).source == "m.py:1 f(x)"
