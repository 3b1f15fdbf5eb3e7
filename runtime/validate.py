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
from typing import Any, NoReturn

from .errors import InputError, ProgramError
from .mesh import Mesh
from .ops import COLLECTIVES, SEND, WAIT, check_op
from .pieces import check_layout
from .program import FORMAT, NO_DTYPE, VERSION, Collective, Instruction, PortSpec, RankProgram, Segment, digest, encode
from .templates import slots_in

MAX_BYTES = 1 << 28
MAX_DIMENSION = 1 << 62
_HEAD, _TAIL = '{"program":', len(',"sha256":""}') + 64


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
        raise ProgramError(f"the program has version {version}, this hocket reads up to {VERSION}: upgrade hocket to run it")
    if version < 1:
        raise ProgramError(f"the program has version {version}, which never existed")


def _build(body: dict[str, Any]) -> RankProgram:
    expected = {"format", "version", "mesh", "inputs", "outputs", "instructions", "segments", "locations", "collectives", "slots"}
    if set(body) != expected:
        raise ValueError(f"expected the fields {sorted(expected)}, found {sorted(body)}")
    return RankProgram(
        mesh=Mesh(tuple((_text(name), _count(size)) for name, size in body["mesh"])),
        inputs=tuple(_port(p) for p in body["inputs"]),
        outputs=tuple(_port(p) for p in body["outputs"]),
        instructions=tuple(_instruction(raw) for raw in body["instructions"]),
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


def _instruction(raw: Any) -> Instruction:
    op, args, kwargs, outputs, spread, frees, location, phase = raw
    ok = type(op) is type(phase) is str and type(args) is type(outputs) is type(frees) is list and type(kwargs) is dict
    if not ok or type(spread) is not bool or type(location) is not int:
        raise ValueError(f"malformed instruction {raw!r}")
    if not {int}.issuperset(map(type, outputs)) or not {int}.issuperset(map(type, frees)):
        raise ValueError(f"slots of an instruction must be integers: {raw!r}")
    return Instruction(op, args, kwargs, tuple(outputs), spread, tuple(frees), location, phase)


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
    for op in sorted({ins.op for ins in program.instructions}):
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
        op = COLLECTIVES.get(ins.op)
        if op is None:
            continue
        if len(ins.args) <= max(op.arguments) or ins.kwargs or ins.spread:
            raise ProgramError(f"{program.describe(index)}: expected {max(op.arguments) + 1} positional arguments")
        axis = ins.args[op.axis]
        if not isinstance(axis, str) or axis not in program.mesh.names:
            raise ProgramError(f"{program.describe(index)}: {axis!r} is no axis of mesh {program.mesh}")
        if op.size is not None and ins.args[op.size] != program.mesh.axis_size(axis):
            raise ProgramError(f"{program.describe(index)}: axis {axis!r} has {program.mesh.axis_size(axis)} ranks")
        found.append((index, ins.op, axis))
    if listed != found:
        raise ProgramError(f"the list of collectives does not match the instructions: {len(listed)} listed, {len(found)} found")


class _Liveness:
    """Walks the program once; ``state[slot]`` is ABSENT, READY, PENDING (a collective under way) or FREED."""

    ABSENT, READY, PENDING, FREED = "not written", "ready", "not waited for", "freed"

    def __init__(self, program: RankProgram) -> None:
        self.program = program
        writes = len(program.inputs) + sum(slot >= 0 for ins in program.instructions for slot in ins.outputs)
        if program.slots != writes:
            raise ProgramError(f"the program declares {program.slots} slots but writes {writes}")
        self.state = [self.ABSENT] * program.slots

    def check(self) -> None:
        for number, segment in enumerate(self.program.segments):
            for port in segment.inputs:
                self.state[port] = self.READY
            for index in range(segment.start, segment.stop):
                self._step(index, self.program.instructions[index])
            self._expect([slot for _, slot in segment.results if slot >= 0], self.READY, -1 - number)
            for slot in segment.frees:
                self._expect((slot,), self.READY, -1 - number)
                self.state[slot] = self.FREED

    def _step(self, index: int, ins: Instruction) -> None:
        op, args, kwargs, outputs, spread, frees, location, _ = ins
        state = self.state
        read = slots_in(args)
        if kwargs:
            read += slots_in(kwargs.values())
        self._expect(read, self.PENDING if op == WAIT else self.READY, index)
        written = [slot for slot in outputs if slot >= 0] if spread else outputs
        self._expect(written, self.ABSENT, index)
        for slot in written:
            state[slot] = self.PENDING if op in COLLECTIVES else self.READY
        if op == WAIT and (kwargs or args not in [[{"slot": slot}] for slot in frees]):
            raise ProgramError(f"{self.program.describe(index)}: a collective is waited for once, and its slot freed there")
        waited = args[0]["slot"] if op == WAIT else outputs[0] if op == SEND and outputs else None
        for slot in frees:
            self._expect((slot,), self.PENDING if slot == waited else self.READY, index)
            state[slot] = self.FREED
        if not 0 <= location < len(self.program.locations) or (not spread and len(outputs) != 1):
            raise ProgramError(f"{self.program.describe(index)}: malformed location or outputs")

    def _expect(self, slots: Iterable[Any], wanted: str, index: int) -> None:
        """All slots are in the wanted state; ``index``: the instruction at work, or -1 - n for the end of segment n."""
        state, count = self.state, len(self.state)
        for slot in slots:
            known = type(slot) is int and 0 <= slot < count
            if not known or state[slot] is not wanted:
                where = self.program.describe(index) if index >= 0 else f"segment {self.program.segments[-1 - index].name!r}"
                found = f"is {state[slot]}" if known else "does not exist"
                raise ProgramError(f"{where}: slot {slot!r} {found}, expected one that is {wanted}")
