"""Reading a program from text, and the conditions every program meets before it is loaded (``check_rank_program``).

1. every op is on the allow-list; every axis is one of the mesh;
2. every slot but the inputs is written exactly once, before it is read; no slot is read after it was freed;
3. the result of a collective is read by one ``wait_tensor`` and by nothing else;
4. segments cover the instructions in order, and their results name every output port once;
5. ``collectives`` lists the collective instructions in order.

All violations raise ProgramError; nothing of the text is executed or imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any, NoReturn

from .collector import without_collector
from .errors import InputError, ProgramError
from .instruction import CallForm, Instruction
from .mesh import Mesh
from .ops import COLLECTIVES, SEND, WAIT, check_op
from .pieces import check_layout
from .program import FORMAT, NO_DTYPE, VERSION, Collective, PortSpec, RankProgram, Segment, digest, encode
from .templates import slots_in

MAX_BYTES = 1 << 28
MAX_DIMENSION = 1 << 62
_FIELDS = {
    "format",
    "version",
    "mesh",
    "inputs",
    "outputs",
    "forms",
    "instructions",
    "segments",
    "locations",
    "collectives",
    "slots",
}
_HEAD, _TAIL = '{"program":', len(',"sha256":""}') + 64


@without_collector()
def read_program(text: str | bytes) -> RankProgram:
    """The program in ``text``; see ``RankProgram.from_json``."""
    if len(text) > MAX_BYTES:
        raise ProgramError(f"a program has at most {MAX_BYTES} bytes, found {len(text)}")
    try:
        words = text.decode("ascii") if isinstance(text, bytes) else text
        document = json.loads(words, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProgramError(f"the program is not valid JSON: {error}") from error
    if not isinstance(document, dict) or set(document) != {"program", "sha256"} or not isinstance(document["program"], dict):
        raise ProgramError('expected {"program": ..., "sha256": ...}: this is no program of hocket')
    body = document["program"]
    _check_version(body)
    canonical = words[len(_HEAD) : -_TAIL]
    if digest_of(canonical) != document["sha256"] and digest(encode(body)) != document["sha256"]:
        raise ProgramError("the program is corrupt: its sha256 does not match its content")
    try:
        program = _build(body)
    except (TypeError, ValueError, KeyError, InputError) as error:
        raise ProgramError(f"the program is malformed: {error}") from error
    check_rank_program(program)
    return program


def digest_of(canonical: str) -> str:
    """The digest of a slice that may not be ASCII; "" then."""
    return digest(canonical) if canonical.isascii() else ""


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_version(body: dict[str, Any]) -> None:
    version = body.get("version")
    if body.get("format") != FORMAT or not isinstance(version, int):
        raise ProgramError(f"expected a program of format {FORMAT!r}, found {body.get('format')!r}")
    if version > VERSION:
        raise ProgramError(f"the program has version {version}, this hocket reads {VERSION}: upgrade hocket to run it")
    if version < VERSION:
        raise ProgramError(f"the program has version {version}, this hocket reads {VERSION}: emit it again")


def _build(body: dict[str, Any]) -> RankProgram:
    if set(body) != _FIELDS:
        raise ValueError(f"expected the fields {sorted(_FIELDS)}, found {sorted(body)}")
    return RankProgram(
        mesh=Mesh(tuple((_text(name), _count(size)) for name, size in body["mesh"])),
        inputs=tuple(_port(p) for p in body["inputs"]),
        outputs=tuple(_port(p) for p in body["outputs"]),
        instructions=_instructions(body["instructions"], [_form(*raw) for raw in body["forms"]]),
        segments=tuple(_segment(*raw) for raw in body["segments"]),
        locations=tuple(_text(line) for line in body["locations"]),
        collectives=tuple(
            Collective(_count(i), _text(op), _text(axis), _counts(s), _text(d)) for i, op, axis, s, d in body["collectives"]
        ),
        slots=_count(body["slots"]),
        version=body["version"],
    )


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"expected a string, found {value!r}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < MAX_DIMENSION:
        raise ValueError(f"expected a non-negative integer, found {value!r}")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    if type(values) is not list:
        raise ValueError(f"expected a list of integers, found {values!r}")
    return tuple(map(_count, values))


def _port(raw: Any) -> PortSpec:
    kind, name, shape, dtype, layout = raw
    return PortSpec(_text(kind), _text(name), _counts(shape), _text(dtype), tuple(_text(p) for p in layout))


def _form(op: Any, args: Any, kwargs: Any, spread: Any, phase: Any) -> CallForm:
    if type(args) is not list or type(kwargs) is not dict:
        raise ValueError(f"malformed call of {op!r}")
    places = [*slots_in(args), *slots_in(kwargs.values())]
    if places != list(range(len(places))) or not {int}.issuperset(map(type, places)):
        raise ValueError(f"the places of a call must be numbered in order, found {places} in {op!r}")
    return CallForm(_text(op), args, kwargs, _count(spread), _text(phase), len(places))


def _instructions(rows: Any, forms: list[CallForm]) -> tuple[Instruction, ...]:
    """Rows are ``[form, location, outputs, reads, frees]``, the last three spelled out one after another."""
    if type(rows) is not list or not {list}.issuperset(map(type, rows)) or not {int}.issuperset(map(type, chain(*rows))):
        raise ValueError("instructions must be lists of integers")
    if not all(rows) or (rows and not (min(rows)[0] >= 0 and max(rows)[0] < len(forms))):
        raise ValueError(f"an instruction names none of the {len(forms)} calls")
    bounds = [(form, 2 + max(1, form.spread), 2 + max(1, form.spread) + form.places) for form in forms]
    found: list[Instruction] = []
    new = tuple.__new__  # as Instruction._make does, without its call
    for numbers in rows:
        row = tuple(numbers)
        form, written, read = bounds[row[0]]
        if len(row) < read:
            raise ValueError(f"an instruction of {form.op} needs {read} numbers, found {len(row)}")
        found.append(new(Instruction, (form, row[written:read], row[2:written], row[read:], row[1])))
    return tuple(found)


def _segment(name: Any, start: Any, stop: Any, inputs: Any, results: Any, frees: Any) -> Segment:
    pairs = []
    for port, slot in results:
        if type(slot) is not int or slot < -1:
            raise ValueError(f"malformed result ({port!r}, {slot!r})")
        pairs.append((_count(port), slot))
    return Segment(_text(name), _count(start), _count(stop), _counts(inputs), tuple(pairs), _counts(frees))


def check_rank_program(program: RankProgram) -> None:
    """Raise ProgramError naming the first condition of this module that a program breaks."""
    for port in (*program.inputs, *program.outputs):
        if port.dtype != NO_DTYPE:
            check_layout(port.layout, len(port.shape), program.mesh)
    forms = {id(ins.form): ins.form for ins in program.instructions}
    for op in sorted({form.op for form in forms.values()}):
        check_op(op)
    _check_segments(program)
    _check_collectives(program)
    _Liveness(program).check()


def _check_segments(program: RankProgram) -> None:
    position = 0
    for segment in program.segments:
        if segment.start != position or segment.stop < segment.start:
            raise ProgramError(
                f"segment {segment.name!r} must start at instruction {position}, found {segment.start}..{segment.stop}"
            )
        position = segment.stop
    if position != len(program.instructions):
        raise ProgramError(f"the segments cover {position} of {len(program.instructions)} instructions")
    ports = sorted(port for segment in program.segments for port, _ in segment.results)
    if ports != list(range(len(program.outputs))):
        raise ProgramError(f"the segments must return each of the {len(program.outputs)} outputs once, found {ports}")
    inputs = sorted(port for segment in program.segments for port in segment.inputs)
    if inputs != list(range(len(program.inputs))):
        raise ProgramError(f"the segments must take each of the {len(program.inputs)} inputs once, found {inputs}")
    if len({segment.name for segment in program.segments}) != len(program.segments):
        raise ProgramError("two segments have the same name")


def _check_collectives(program: RankProgram) -> None:
    listed = [(c.instruction, c.op, c.axis) for c in program.collectives]
    found = []
    for index, ins in enumerate(program.instructions):
        form = ins.form
        if form.op not in COLLECTIVES:
            continue
        op = COLLECTIVES[form.op]
        if len(form.args) <= max(op.arguments) or form.kwargs or form.spread:
            raise ProgramError(f"{program.describe(index)}: expected {max(op.arguments) + 1} positional arguments")
        axis = form.args[op.axis]
        if not isinstance(axis, str) or axis not in program.mesh.names:
            raise ProgramError(f"{program.describe(index)}: {axis!r} is no axis of mesh {program.mesh}")
        if op.size is not None and form.args[op.size] != program.mesh.axis_size(axis):
            raise ProgramError(f"{program.describe(index)}: axis {axis!r} has {program.mesh.axis_size(axis)} ranks")
        found.append((index, form.op, axis))
    if listed != found:
        raise ProgramError(f"the list of collectives does not match the instructions: {len(listed)} listed, {len(found)} found")


_ABSENT, _READY, _PENDING, _FREED = range(4)
_STATES = ("not written", "ready", "not waited for", "freed")
"""What a slot may be; pending: the result of a collective that is under way."""


class _Liveness:
    """Walks the program once, with the state of every slot at hand."""

    def __init__(self, program: RankProgram) -> None:
        self.program = program
        written = list(chain.from_iterable(ins.outputs for ins in program.instructions))
        writes = len(program.inputs) + len(written) - written.count(-1)
        if program.slots != writes:
            raise ProgramError(f"the program declares {program.slots} slots but writes {writes}")
        self.state = [_ABSENT] * program.slots

    def check(self) -> None:
        for number, segment in enumerate(self.program.segments):
            for port in segment.inputs:
                self.state[port] = _READY
            self._walk(segment.start, segment.stop)
            self._expect([slot for _, slot in segment.results if slot >= 0], _READY, -1 - number)
            for slot in segment.frees:
                self._expect((slot,), _READY, -1 - number)
                self.state[slot] = _FREED

    def _walk(self, start: int, stop: int) -> None:
        """The instructions of a segment; what nearly all of them do is decided here, in few operations each."""
        state, known, lines = self.state, frozenset(range(len(self.state))), len(self.program.locations)
        special = COLLECTIVES.keys() | {WAIT}
        for index, (form, reads, outputs, frees, location) in enumerate(self.program.instructions[start:stop], start):
            if len(reads) != form.places or len(outputs) != (form.spread or 1) or not 0 <= location < lines:
                raise ProgramError(f"instruction {index}, {form.op}: its slots do not fit the call, or its location does not exist")
            if not known.issuperset(reads) or not known.issuperset(frees):
                raise ProgramError(f"{self.program.describe(index)}: a slot does not exist")
            if form.op in special:
                self._communicate(index)
                continue
            for slot in reads:
                if state[slot] != _READY:
                    self._expect(reads, _READY, index)
            for slot in outputs:
                if slot in known and state[slot] == _ABSENT:
                    state[slot] = _READY
                else:
                    self._write(slot, _READY, index)
            for slot in frees:
                if state[slot] != _READY:
                    self._expect((slot,), _READY, index)
                state[slot] = _FREED

    def _write(self, slot: int, state: int, index: int) -> None:
        if slot != -1 or not self.program.instructions[index].form.spread:
            self._expect((slot,), _ABSENT, index)
            self.state[slot] = state

    def _communicate(self, index: int) -> None:
        """A collective leaves its result pending; the wait that makes it ready frees it, and nothing else may touch it."""
        form, reads, outputs, frees, _ = self.program.instructions[index]
        waits = form.op == WAIT
        self._expect(reads, _PENDING if waits else _READY, index)
        if waits and (form.kwargs or form.spread or form.args != [{"slot": 0}] or frees != reads):
            raise ProgramError(f"{self.program.describe(index)}: a collective is waited for once, and its slot freed there")
        for slot in outputs:
            self._write(slot, _READY if waits else _PENDING, index)
        for slot in frees:
            under_way = waits or (form.op == SEND and slot == outputs[0])
            self._expect((slot,), _PENDING if under_way else _READY, index)
            self.state[slot] = _FREED

    def _expect(self, slots: Iterable[int], wanted: int, index: int) -> None:
        """All slots are in the wanted state; ``index``: the instruction at work, or -1 - n for the end of segment n."""
        for slot in slots:
            known = 0 <= slot < len(self.state)
            if not known or self.state[slot] != wanted:
                where = self.program.describe(index) if index >= 0 else f"segment {self.program.segments[-1 - index].name!r}"
                found = f"is {_STATES[self.state[slot]]}" if known else "does not exist"
                raise ProgramError(f"{where}: slot {slot} {found}, expected one that is {_STATES[wanted]}")
