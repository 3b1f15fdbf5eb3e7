"""From a Program to the instruction list that ranks run (``runtime.program.RankProgram``).

    forward     what the outputs and updates need without a tangent, and every other node of the forward phase
    backward    everything else, in graph order: so a recomputation of activations, which reads no tangent, still runs late

A program without TANGENT inputs is one segment: ``step`` when it computes gradients or optimizer updates, ``forward`` otherwise.
Nodes that nothing needs are left out, ``getitem`` costs nothing at run time, and a slot is freed after its last reader.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from ..runtime.collector import without_collector
from ..runtime.mesh import Mesh
from ..runtime.ops import SEND, op_name
from ..runtime.program import RankProgram, Segment
from ..runtime.validate import check_rank_program
from .instructions import Emitter, refusal
from .ports import Ports
from .program import Phase, Program, RoleKind, ancestors, note

FORWARD, BACKWARD, STEP = "forward", "backward", "step"


@without_collector()
def emit(program: Program, logical: Program | None = None) -> RankProgram:
    """The instruction list of a lowered program, or of a logical one for a mesh of one rank.

    logical: the program before lowering, with the same signature; it gives the global shapes of inputs and outputs, which the notes
    of the lowered one may lack. Values of CONSTANT inputs are not part of the result; they travel beside it. Raises ProgramError
    naming the node and the user's line for anything an instruction list cannot say.
    """
    mesh = program.mesh or Mesh((("d", 1),))
    ports = Ports(program, mesh, logical)
    late = _late_nodes(program)
    emitter = Emitter(mesh)
    for slot, node in enumerate(program.placeholders):
        emitter.values[node] = {"slot": slot}
    emitter.slots = len(program.placeholders)
    needed = _needed(program)
    names = _segment_names(program)
    bounds = []
    for position, _ in enumerate(names):
        for node in program.nodes:
            if node in needed and node.op == "call_function" and (node in late) == (position == 1):
                emitter.add(node)
        bounds.append(len(emitter.instructions))
    emitted = RankProgram(
        mesh=mesh,
        inputs=tuple(ports.inputs()),
        outputs=tuple(ports.outputs()),
        instructions=tuple(emitter.instructions),
        segments=_segments(program, emitter, names, bounds, late),
        locations=tuple(emitter.locations),
        collectives=tuple(emitter.collectives),
        slots=emitter.slots,
    )
    emitted = _with_frees(emitted)
    check_rank_program(emitted)
    return emitted


def _segment_names(program: Program) -> tuple[str, ...]:
    if program.signature.inputs_of(RoleKind.TANGENT):
        return (FORWARD, BACKWARD)
    whole = bool(program.signature.outputs_of(RoleKind.GRADIENT)) or any(note(n).phase is Phase.OPTIMIZER for n in program.nodes)
    return (STEP,) if whole else (FORWARD,)


def _late_nodes(program: Program) -> set[fx.Node]:
    """The nodes of the backward segment; empty for a program of one segment."""
    tangents = {program.placeholders[i] for i in program.signature.inputs_of(RoleKind.TANGENT).values()}
    if not tangents:
        return set()
    tainted = set(tangents)
    for node in program.nodes:
        if any(source in tainted for source in node.all_input_nodes):
            tainted.add(node)
    early_results = [
        result
        for role, result in zip(program.signature.outputs, program.results, strict=True)
        if role.kind is not RoleKind.GRADIENT and result is not None and result not in tainted
    ]
    early = ancestors(early_results)
    forward = ancestors(n for n in program.nodes if n.op == "call_function" and n not in tainted and note(n).phase is Phase.FORWARD)
    return {n for n in program.nodes if n.op == "call_function" and n not in early and n not in forward}


def _needed(program: Program) -> set[fx.Node]:
    """What results depend on, and every send with what it sends."""
    sends = [n for n in program.nodes if isinstance(n.target, torch._ops.OpOverload) and op_name(n.target) == SEND]
    return ancestors([*(r for r in program.results if r is not None), *sends])


def _segments(
    program: Program, emitter: Emitter, names: tuple[str, ...], bounds: list[int], late: set[fx.Node]
) -> tuple[Segment, ...]:
    roles = program.signature.inputs
    found = []
    for position, (name, stop) in enumerate(zip(names, bounds, strict=True)):
        inputs = tuple(i for i, r in enumerate(roles) if (r.kind is RoleKind.TANGENT) == (position == 1))
        results = []
        for port, (role, node) in enumerate(zip(program.signature.outputs, program.results, strict=True)):
            is_late = len(names) == 2 and (role.kind is RoleKind.GRADIENT or node in late or _is_tangent(program, node))
            if is_late == (position == 1):
                results.append((port, -1 if node is None else _result_slot(emitter, node)))
        found.append(Segment(name, bounds[position - 1] if position else 0, stop, inputs, tuple(results), ()))
    return tuple(found)


def _is_tangent(program: Program, node: fx.Node | None) -> bool:
    tangents = program.signature.inputs_of(RoleKind.TANGENT).values()
    return node is not None and node.op == "placeholder" and program.placeholders.index(node) in tangents


def _result_slot(emitter: Emitter, node: fx.Node) -> int:
    value = emitter.values[node]
    if not isinstance(value, dict) or "slot" not in value:
        raise refusal(node, "a result must be one tensor")
    slot: int = value["slot"]
    if emitter.is_pending(slot):
        raise refusal(node, "a collective must be waited for before it is a result")
    return slot


def _with_frees(program: RankProgram) -> RankProgram:
    """Free every slot after its last use: at its last reader, or at the end of the last segment that returns it."""
    last: dict[int, tuple[bool, int]] = {}
    for position, segment in enumerate(program.segments):
        for port in segment.inputs:
            last[port] = (True, position)
        for index in range(segment.start, segment.stop):
            ins = program.instructions[index]
            for slot in (*ins.reads, *ins.outputs):
                last[slot] = (False, index)
        for _, slot in segment.results:
            last[slot] = (True, position)
    last.pop(-1, None)
    at_instruction: dict[int, list[int]] = {}
    at_segment: dict[int, list[int]] = {}
    for slot, (at_end, where) in last.items():
        (at_segment if at_end else at_instruction).setdefault(where, []).append(slot)
    freed = [ins._replace(frees=tuple(sorted(at_instruction.get(i, ())))) for i, ins in enumerate(program.instructions)]
    segments = [s._replace(frees=tuple(sorted(at_segment.get(i, ())))) for i, s in enumerate(program.segments)]
    return RankProgram(
        program.mesh,
        program.inputs,
        program.outputs,
        tuple(freed),
        tuple(segments),
        program.locations,
        program.collectives,
        program.slots,
    )
