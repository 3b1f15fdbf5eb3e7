"""What a rank executes: a flat list of instructions over numbered slots, as pure data.

A ``RankProgram`` is the last form of a program, the only one that travels to ranks. It is JSON: op names, slot numbers, constants,
port descriptions; no code, no pickle. One program serves every rank of an SPMD step, since groups are mesh-axis names and
rank-dependent integers are expressions (``templates``) that a rank folds when it loads the program.

    slots         0 .. len(inputs)-1 are the inputs in order; every other slot is written by exactly one instruction
    forms         instructions that call the same op with the same constants share a form (``instruction``), and its text
    segments      contiguous ranges of instructions run by separate calls on one frame (forward, later backward)
    freeing       an instruction names the slots whose value nobody reads after it, in any segment
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import ProgramError
from .instruction import CallForm, Instruction
from .mesh import Mesh

FORMAT = "hocket-rank-program"
VERSION = 2

NO_DTYPE = "none"
"""dtype of an output port that has no value (a gradient that does not exist)."""


@dataclass(frozen=True)
class PortSpec:
    """One input or output of the program.

    kind, name: as ``Role`` has them (``param``, ``layers.0.weight``); shape: GLOBAL sizes; dtype: ``float32`` and the like, or
    ``NO_DTYPE`` for an output without value; layout: one of ``R``, ``S(dim)``, ``P(op)`` per mesh axis, outermost first.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


class Segment(NamedTuple):
    """Instructions ``start .. stop-1``, run by one call.

    inputs: ports handed over when the segment starts (TANGENT ports belong to the backward); results: (output port, slot) pairs,
    slot -1 for an output without value; frees: slots to drop once the results are taken.
    """

    name: str
    start: int
    stop: int
    inputs: tuple[int, ...]
    results: tuple[tuple[int, int], ...]
    frees: tuple[int, ...]


class Collective(NamedTuple):
    """A collective or point-to-point instruction: its op, mesh axis, and the input's shape (rank 0's piece) and dtype."""

    instruction: int
    op: str
    axis: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class RankProgram:
    """See the module. ``slots`` is the number of values a frame holds; ``locations[0]`` is always the empty string."""

    mesh: Mesh
    inputs: tuple[PortSpec, ...]
    outputs: tuple[PortSpec, ...]
    instructions: tuple[Instruction, ...]
    segments: tuple[Segment, ...]
    locations: tuple[str, ...]
    collectives: tuple[Collective, ...]
    slots: int
    version: int = VERSION

    def segment(self, name: str) -> Segment:
        """The segment of that name; ProgramError when there is none."""
        for segment in self.segments:
            if segment.name == name:
                return segment
        raise ProgramError(f"expected one of the segments {[s.name for s in self.segments]}, found {name!r}")

    def segment_outputs(self, name: str) -> tuple[int, ...]:
        """Indices into ``outputs`` of what a segment returns, in the order in which it returns them."""
        return tuple(port for port, _ in self.segment(name).results)

    def inputs_of(self, kind: str) -> dict[str, int]:
        """name -> index into ``inputs``, for the ports of one kind."""
        return {port.name: i for i, port in enumerate(self.inputs) if port.kind == kind}

    def inputs_read_after(self, name: str) -> frozenset[int]:
        """Input ports (and outputs that are the input itself) whose slot is still needed once that segment has ended.

        Whoever overwrites such an input in place between two segments must hand a copy to the frame first.
        """
        segment = self.segment(name)
        freed = {slot for ins in self.instructions[: segment.stop] for slot in ins.frees}
        for earlier in self.segments[: self.segments.index(segment) + 1]:
            freed.update(earlier.frees)
        later = {port for s in self.segments[self.segments.index(segment) + 1 :] for port in s.inputs}
        return frozenset(set(range(len(self.inputs))) - freed - later)

    def describe(self, index: int) -> str:
        """One instruction as text, for errors and traces: ``%7 = aten.mm.default(%3, %5)``."""
        ins = self.instructions[index]
        words = [_show(a) for a in ins.args] + [f"{k}={_show(v)}" for k, v in ins.kwargs.items()]
        left = ", ".join("_" if slot < 0 else f"%{slot}" for slot in ins.outputs)
        return f"{left} = {ins.op}({', '.join(words)})"

    def source(self, index: int) -> str:
        """The user's line behind an instruction, "" where unknown."""
        return self.locations[self.instructions[index].location]

    @functools.cached_property
    def sha256(self) -> str:
        """Digest of the canonical body: the identity of the program."""
        return digest(encode(_body(self)))

    def to_json(self) -> str:
        """Deterministic text ``{"program": body, "sha256": digest}``; ``from_json`` restores an equal program."""
        body = encode(_body(self))
        return f'{{"program":{body},"sha256":"{digest(body)}"}}'

    @classmethod
    def from_json(cls, text: str | bytes) -> RankProgram:
        """Read and check a program. ProgramError when it is corrupt, newer than this hocket, oversized or asks for a foreign op."""
        from .validate import read_program

        return read_program(text)


def encode(body: Mapping[str, Any]) -> str:
    """Canonical JSON: sorted keys, no spaces, ASCII, no NaN literals."""
    return json.dumps(body, separators=(",", ":"), sort_keys=True, allow_nan=False, ensure_ascii=True)


def digest(canonical: str) -> str:
    """sha256 of the canonical JSON of a body."""
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def _body(program: RankProgram) -> dict[str, Any]:
    forms, numbers = _forms(program.instructions)
    return {
        "format": FORMAT,
        "version": program.version,
        "mesh": program.mesh.axes,
        "inputs": [[p.kind, p.name, p.shape, p.dtype, p.layout] for p in program.inputs],
        "outputs": [[p.kind, p.name, p.shape, p.dtype, p.layout] for p in program.outputs],
        "forms": [[form.op, form.args, form.kwargs, form.spread, form.phase] for form in forms],
        "instructions": [
            [number, ins.location, *ins.outputs, *ins.reads, *ins.frees]
            for number, ins in zip(numbers, program.instructions, strict=True)
        ],
        "segments": program.segments,
        "locations": program.locations,
        "collectives": program.collectives,
        "slots": program.slots,
    }


def _forms(instructions: Sequence[Instruction]) -> tuple[list[CallForm], list[int]]:
    """The different forms in the order in which they appear first, and the number of each instruction's form among them."""
    known: dict[int, int] = {}  # most equal forms are one object
    equal: dict[str, int] = {}
    forms: list[CallForm] = []
    for ins in instructions:
        if id(ins.form) not in known:
            known[id(ins.form)] = number = equal.setdefault(repr(ins.form), len(forms))
            if number == len(forms):
                forms.append(ins.form)
    return forms, [known[id(ins.form)] for ins in instructions]


def _show(template: Any) -> str:
    if isinstance(template, list):
        return "[" + ", ".join(_show(t) for t in template) + "]"
    if isinstance(template, dict):
        ((tag, value),) = template.items()
        if tag == "slot":
            return f"%{value}"
        return f"{tag}({', '.join(_show(v) for v in value) if isinstance(value, list) else _show(value)})"
    return str(template)
