import json
import math

import pytest
import torch
from hand_lowered import ATEN, Builder, data_parallel_training, tensor_parallel_mlp, uneven_windows
from hypothesis import given, settings
from hypothesis import strategies as st
from local_support import single

from hocket.compiler.emit import emit
from hocket.runtime.errors import ProgramError
from hocket.runtime.load import load
from hocket.runtime.mesh import Mesh
from hocket.runtime.ops import overload_of
from hocket.runtime.program import VERSION, RankProgram, digest, encode
from hocket.runtime.templates import Site, encode_constant, fold
from hocket.runtime.tile_loop import TILE_LOOP
from hocket.runtime.validate import check_rank_program

CASES = (tensor_parallel_mlp, data_parallel_training, uneven_windows)

constants = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**62), 2**62),
    st.floats(),
    st.text(max_size=8),
    st.complex_numbers(),
    st.sampled_from([torch.float32, torch.bool, torch.strided, torch.channels_last, torch.device("cpu"), torch.device("cuda")]),
)


def tampered(program: RankProgram, **changes) -> str:
    """The text of a program with some fields of its body replaced and a digest that fits."""
    body = {**json.loads(program.to_json())["program"], **changes}
    return json.dumps({"program": body, "sha256": digest(encode(body))})


def forms_of(program: RankProgram) -> list[list]:
    """The calls of a program as its text has them: op, args, kwargs, spread, phase."""
    return json.loads(program.to_json())["program"]["forms"]


@pytest.mark.parametrize("case", CASES)
def test_text_restores_an_equal_program_and_is_deterministic(case):
    program = emit(case())
    text = program.to_json()
    again = RankProgram.from_json(text)
    assert again == program
    assert again.to_json() == text == emit(case()).to_json()
    assert again.sha256 == program.sha256
    assert RankProgram.from_json(json.dumps(json.loads(text), indent=1).encode()) == program


@settings(deadline=None, max_examples=200)
@given(st.recursive(constants, lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_constants_survive_json_and_folding(value):
    template = json.loads(encode({"x": encode_constant(value)}))["x"]
    folded = fold(template, Site.of(Mesh((("d", 1),)), 0))
    assert repr(folded) == repr(value)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "mul", "clamp", "cat", "split", "scale", "convert"]),
            st.integers(0, 9),
            st.integers(0, 9),
            st.floats(allow_nan=False),
        ),
        max_size=12,
    ),
    st.integers(0, 9),
)
def test_random_programs_survive_json(steps, last):
    b = Builder("d=1")
    values = [b.input("input", "x", (2, 4), "R"), b.input("param", "w", (2, 4), "R")]
    for kind, i, j, number in steps:
        one, two = values[i % len(values)], values[j % len(values)]
        match kind:
            case "add":
                values.append(b.op(ATEN.add.Tensor, one, two, alpha=number))
            case "mul":
                values.append(b.op(ATEN.mul.Tensor, one, two))
            case "scale":
                values.append(b.op(ATEN.mul.Tensor, one, number))
            case "clamp":
                values.append(b.op(ATEN.clamp.default, one, -math.inf, number))
            case "convert":
                values.append(b.op(ATEN._to_copy.default, one, dtype=torch.float32, memory_format=torch.contiguous_format))
            case "cat":
                values.append(b.op(ATEN.slice.Tensor, b.op(ATEN.cat.default, [one, two], 1), 1, 2, 6))
            case "split":
                halves = b.op(ATEN.split.Tensor, one, 2, 1)
                import operator

                values.append(b.op(ATEN.cat.default, [b.op(operator.getitem, halves, 1), b.op(operator.getitem, halves, 0)], 1))
    b.output("output", "y", values[last % len(values)], "R", (2, 4))
    program = emit(b.program())
    assert RankProgram.from_json(program.to_json()) == program


def test_every_flipped_byte_is_refused():
    text = emit(data_parallel_training()).to_json()
    for position in range(0, len(text), 7):
        broken = text[:position] + chr((ord(text[position]) ^ 1) or 1) + text[position + 1 :]
        with pytest.raises(ProgramError):
            RankProgram.from_json(broken)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"program":{},"sha256":""}', "[" * 100000, "\xff", '{"a":NaN}', "1" * 5000]
)
def test_text_that_is_no_program_is_refused(text):
    with pytest.raises(ProgramError):
        RankProgram.from_json(text)


def test_a_truncated_program_is_refused():
    text = emit(data_parallel_training()).to_json()
    for length in (10, len(text) // 2, len(text) - 1):
        with pytest.raises(ProgramError):
            RankProgram.from_json(text[:length])


def test_an_older_program_says_so():
    with pytest.raises(ProgramError, match="emit it again"):
        RankProgram.from_json(tampered(emit(data_parallel_training()), version=VERSION - 1))


def test_a_newer_program_says_so():
    with pytest.raises(ProgramError, match="upgrade hocket"):
        RankProgram.from_json(tampered(emit(data_parallel_training()), version=VERSION + 1))


@pytest.mark.parametrize(
    "op",
    [
        "os.system.default",
        "builtins.eval.default",
        "aten.mm",
        "quantized.add.default",
        "aten.mm.default;",
        "_c10d_functional.all_reduce_.default",
    ],
)
def test_ops_outside_the_allow_list_are_refused_when_read(op):
    program = emit(data_parallel_training())
    forms = forms_of(program)
    forms[0][0] = op
    with pytest.raises(ProgramError, match=r"not allowed|not supported"):
        RankProgram.from_json(tampered(program, forms=forms))


@pytest.mark.parametrize(
    "op",
    [
        "aten.nosuch.default",
        "aten.mm.nosuch",
        "aten.add_.Tensor",
        "aten.from_file.default",
        "aten.save.default",
        "hocket.nosuch.default",
    ],
)
def test_ops_that_are_unknown_or_not_functional_are_refused_when_loaded(op):
    with pytest.raises(ProgramError):
        overload_of(op)
    program = emit(data_parallel_training())
    forms = forms_of(program)
    forms[0][0] = op
    with pytest.raises(ProgramError):
        load(RankProgram.from_json(tampered(program, forms=forms)), 0)


def broken_bodies():
    program = emit(data_parallel_training())
    raw = json.loads(program.to_json())["program"]

    def edit(**changes):
        return {**raw, **changes}

    def instruction(index, position, value):  # a row is form, location, outputs, reads, frees
        copy = [list(ins) for ins in raw["instructions"]]
        copy[index][position:] = value
        return edit(instructions=copy)

    def form(index, position, value):
        copy = [list(form) for form in raw["forms"]]
        copy[index][position] = value
        return edit(forms=copy)

    assert raw["instructions"][0] == [0, 1, 5, 0, 1, 1]
    yield "reads an unwritten slot", instruction(0, 3, [12, 1, 1])
    yield "reads a slot out of range", instruction(0, 3, [10**9, 1, 1])
    yield "reads a negative slot", instruction(0, 3, [-2, 1, 1])
    yield "writes an input", instruction(0, 2, [0, 0, 1, 1])
    yield "writes a negative slot", instruction(0, 2, [-1, 0, 1, 1])
    yield "frees a slot that is still read", instruction(0, 3, [0, 1, 0, 1, 2])
    yield "frees a slot twice", instruction(0, 3, [0, 1, 1, 1])
    yield "a negative free", instruction(0, 3, [0, 1, -1])
    yield "a free out of range", instruction(0, 3, [0, 1, 10**9])
    yield "a boolean slot", instruction(0, 3, [0, True, 1])
    yield "a slot that is a number with a point", instruction(0, 3, [0, 1.0, 1])
    yield "too few slots for the call", instruction(0, 3, [0])
    yield "an empty instruction", instruction(0, 0, [])
    yield "no such location", instruction(0, 1, [99, 5, 0, 1, 1])
    yield "a negative location", instruction(0, 1, [-1, 5, 0, 1, 1])
    yield "no such call", instruction(0, 0, [99, 1, 5, 0, 1, 1])
    yield "a negative call", instruction(0, 0, [-1, 1, 5, 0, 1, 1])
    yield "an instruction that is no list", edit(instructions=["ab", *raw["instructions"][1:]])
    yield "places that are not in order", form(0, 1, [{"slot": 1}, {"slot": 0}])
    yield "a place left out", form(0, 1, [{"slot": 0}, {"slot": 2}])
    yield "a place that is a boolean", form(0, 1, [{"slot": False}, {"slot": True}])
    yield "arguments that are no list", form(0, 1, {"slot": 0})
    yield "keywords that are no dictionary", form(0, 2, [])
    yield "a negative number of results", form(0, 3, -1)
    yield "more results than slots", form(0, 3, 7)
    yield "a form of three fields", edit(forms=[raw["forms"][0][:3], *raw["forms"][1:]])
    yield "more slots than writes", edit(slots=10**9)
    yield "segments leave a gap", edit(segments=[raw["segments"][0], ["backward", 99, 99, [4], [], []]])
    yield "an output twice", edit(segments=[raw["segments"][0], raw["segments"][0]])
    yield "a missing field", {k: v for k, v in raw.items() if k != "slots"}
    yield "an unlisted collective", edit(collectives=raw["collectives"][:1])
    yield "a mesh axis of size 0", edit(mesh=[["dp", 0]])
    yield "another mesh axis", edit(mesh=[["tp", 2]])
    yield "a layout of another rank", edit(inputs=[["input", "x", [6], "float32", ["S(3)"]], *raw["inputs"][1:]])
    yield "a shape of strings", edit(inputs=[["input", "x", ["6"], "float32", ["R"]], *raw["inputs"][1:]])
    wait = next(i for i, form in enumerate(raw["forms"]) if "wait_tensor" in form[0])
    yield "a collective read without a wait", form(wait, 0, "aten.neg.default")
    yield "a wait for something else", form(1, 0, "_c10d_functional.wait_tensor.default")


@pytest.mark.parametrize(("name", "body"), list(broken_bodies()), ids=lambda v: v if isinstance(v, str) else "")
def test_malformed_programs_are_refused(name, body):
    with pytest.raises(ProgramError):
        RankProgram.from_json(json.dumps({"program": body, "sha256": digest(encode(body))}))


@pytest.mark.parametrize(
    "template",
    [
        {"dtype": "nosuch"},
        {"dtype": ["x"]},
        {"device": "cpu:0;"},
        {"a": 1, "b": 2},
        {},
        {"size": [5, "xx"]},
        {"size": [5, []]},
        {"mod": [1, 0]},
        {"float": "1"},
    ],
)
def test_malformed_arguments_are_refused_when_loaded(template):
    program = emit(data_parallel_training())
    forms = forms_of(program)
    added = next(form for form in forms if form[0] == "aten.add.Tensor")
    assert added[1] == [{"slot": 0}, 1]
    added[1][1] = template
    with pytest.raises(ProgramError):
        load(RankProgram.from_json(tampered(program, forms=forms)), 0)


@pytest.mark.parametrize("args", [[], [[]], [[], "{"], [[], "{}", [], "tp", 2], 3 * [[]]])
def test_a_tile_loop_with_the_wrong_words_is_refused_when_loaded(args):
    with pytest.raises(ProgramError):
        load(single(Mesh.parse("tp=2"), TILE_LOOP, args), 0)


def test_rank_dependent_integers_fold_to_the_chunks_of_each_rank():
    mesh = Mesh.parse("dp=2,tp=3")
    template = {"size": [{"size": [11, "dp"]}, "tp"]}
    sizes = [fold(template, Site.of(mesh, rank)) for rank in range(6)]
    assert sizes == [2, 2, 2, 2, 2, 1]
    assert [fold({"offset": [7, 3, {"coordinate": "tp"}]}, Site.of(mesh, r)) for r in range(3)] == [0, 3, 6]
    assert fold({"padded": [7, 3]}, Site.of(mesh, 0)) == 9


def test_instructions_that_call_the_same_share_a_form_and_its_check():
    program = emit(data_parallel_training())
    again = RankProgram.from_json(program.to_json())
    for one in (program, again):
        transposes = [ins for ins in one.instructions if ins.op == "aten.t.default"]
        assert len(transposes) > 1
        assert len({id(ins.form) for ins in transposes}) == 1
    assert [ins.args for ins in again.instructions] == [ins.args for ins in program.instructions]


def test_an_instruction_can_be_made_to_call_something_else():
    first = emit(data_parallel_training()).instructions[0]
    changed = first.calling("aten.add.Tensor", [{"slot": 7}, [{"slot": 3}, 2]], {"alpha": {"slot": 7}})
    assert changed.reads == (7, 3, 7)
    assert changed.args == [{"slot": 7}, [{"slot": 3}, 2]]
    assert changed.kwargs == {"alpha": {"slot": 7}}
    assert changed.outputs == first.outputs


def test_check_accepts_what_emit_makes():
    for case in CASES:
        check_rank_program(emit(case()))
