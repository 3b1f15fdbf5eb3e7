"""From the programs of a stage to what a rank runs: every part emitted, its ports named, weight gradients given as factors.

    g += a @ b     ==     addmm_(g, a, b)

A gradient that is one product, read by nobody else, leaves its part as two factors; the rank adds their product to its accumulator
in one call. That saves the product's memory and a pass over it. The sum may round differently from first the product, then the sum,
where the kernel keeps the accumulator in its registers, so it is a choice (``products``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ....runtime.communicator import Communicator, SingleCommunicator
from ....runtime.errors import InputError
from ....runtime.executors.flat import FlatExecutor
from ....runtime.inductor import compile_graph, missing_compiler
from ....runtime.load import load
from ....runtime.program import RankProgram
from ....runtime.schedule.stage import HELD, Part, Port, Run, StageCode, StageState, ValueSpec
from ....runtime.shapes import Form
from ...emit import emit
from ...layout import replicated
from ...program import Program, Role, RoleKind, Signature, annotate, copy_program, note, output_node
from ...stages import PartKind, Pipeline, StagePart, StageProgram, Value

aten = torch.ops.aten


def stage_codes(pipeline: Pipeline, *, products: bool = False, inductor: bool = False) -> list[StageCode]:
    """What each stage of a pipeline needs on a rank of its own; see ``stage_code``."""
    return [stage_code(stage, products=products, inductor=inductor) for stage in pipeline.stages]


def stage_code(
    stage: StageProgram, *, products: bool = False, inductor: bool = False, communicator: Communicator | None = None
) -> StageCode:
    """One stage, for the rank of a communicator (default: a rank alone).

    products: add weight gradients by ``addmm_``, see the module; inductor: compile every part with torch's Inductor, whose kernels
    round differently from those of eager PyTorch. Raises InputError where Inductor finds no C++ compiler.
    """
    network = communicator or SingleCommunicator()
    if inductor and (reason := missing_compiler()):
        raise InputError(f"inductor=True, but {reason}")

    def code(part: StagePart) -> Part:
        return part_code(part, network, products=products, inductor=inductor)

    return assemble(stage, code)


def assemble(stage: StageProgram, part_of: Callable[[StagePart], Part]) -> StageCode:
    """The code of a stage from what ``part_of`` makes of each of its parts."""

    def only(kind: PartKind) -> Part | None:
        parts = stage.of(kind)
        return part_of(parts[0]) if parts else None

    forward = only(PartKind.FORWARD)
    assert forward is not None, "every stage has a forward"
    return StageCode(
        stage=stage.stage,
        forward=forward,
        backward=only(PartKind.BACKWARD_INPUT),
        weights=tuple(map(part_of, stage.of(PartKind.BACKWARD_WEIGHT))),
        share=only(PartKind.SHARE),
        optimizer=only(PartKind.OPTIMIZER),
        receives=_specs(stage.receives),
        sends=_specs(stage.sends),
        receives_back=_specs(stage.receives_back),
        sends_back=_specs(stage.sends_back),
    )


def part_code(part: StagePart, communicator: Communicator, *, products: bool = False, inductor: bool = False) -> Part:
    """One part as a callable with named ports; see ``stage_code``."""
    program, ports = part.program, [Port(role.kind.value, role.name) for role in part.program.signature.outputs]
    if products and part.kind in (PartKind.BACKWARD_INPUT, PartKind.BACKWARD_WEIGHT):
        program, ports = as_factors(program)
    inputs = tuple(Port(role.kind.value, role.name) for role in program.signature.inputs)
    run = _compiled(program) if inductor else _runner(program, communicator)
    return Part(run, inputs, tuple(ports), part.drops)


def as_factors(program: Program) -> tuple[Program, list[Port]]:
    """The program with gradients that are products given as their factors, and its output ports."""
    copy, _ = copy_program(program)
    results, roles, ports = [], [], []
    for node, role in zip(copy.results, copy.signature.outputs, strict=True):
        is_product = node is not None and node.target is aten.mm.default and len(node.users) == 1
        if node is None or role.kind is not RoleKind.GRADIENT or not is_product:
            results.append(node)
            roles.append(role)
            ports.append(Port(role.kind.value, role.name))
            continue
        for side, factor in zip(("left", "right"), node.args, strict=True):
            results.append(factor)  # type: ignore[arg-type]
            roles.append(Role(RoleKind.VALUE, f"{side} factor of {role.name}"))
            ports.append(Port(side, role.name))
    output = output_node(copy.graph.graph)
    products = [node for node in copy.results if node is not None and node not in results]
    output.args = (tuple(results),)
    for node in products:
        copy.graph.graph.erase_node(node)
    return copy.replace(signature=Signature(inputs=copy.signature.inputs, outputs=tuple(roles))), ports


def _runner(program: Program, communicator: Communicator) -> Run:
    """The emitted program behind one call; its results in the order of the program's outputs."""
    emitted = rank_program(program)
    executor = FlatExecutor(load(emitted, communicator.rank), communicator)
    segment = emitted.segments[0].name
    order = emitted.segment_outputs(segment)
    assert len(emitted.segments) == 1, "a part of a stage is one segment"
    in_order = list(order) == list(range(len(order)))

    def run(arguments: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        results = executor.run(executor.open(arguments), segment)
        if in_order:
            return results
        found: list[torch.Tensor | None] = [None] * len(emitted.outputs)
        for port, result in zip(order, results, strict=True):
            found[port] = result
        return found

    return run


def rank_program(program: Program) -> RankProgram:
    """A part's program for its rank. Values that stay on a rank are what they are there: their layout is not said where a lowered
    program has none for them."""
    ready = _without_tangents(program)
    if program.mesh is not None:
        ready, _ = copy_program(ready)
        whole = (replicated(program.mesh),)
        for node in (*ready.placeholders, *ready.results):
            if node is not None and note(node).layouts is None and isinstance(node.meta["val"], torch.Tensor):
                annotate(node, layouts=whole, global_shapes=(tuple(int(size) for size in node.meta["val"].shape),))
    return emit(ready)


def _compiled(program: Program) -> Run:
    """The program as one kernel of Inductor. Outputs that a kernel cannot give (none) stay where they are."""
    copy, _ = copy_program(program)
    there = [index for index, node in enumerate(copy.results) if node is not None]
    output_node(copy.graph.graph).args = (tuple(node for node in copy.results if node is not None),)
    kernel = compile_graph(copy.graph, [Form.of(node.meta["val"]) for node in copy.placeholders])

    def run(arguments: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
        found: list[torch.Tensor | None] = [None] * len(program.signature.outputs)
        for index, result in zip(there, kernel(*arguments), strict=True):
            found[index] = result
        return found

    return run


def _without_tangents(program: Program) -> Program:
    """Tangents as ordinary inputs: a part is one segment, whatever it reads."""
    if not program.signature.inputs_of(RoleKind.TANGENT):
        return program
    copy, _ = copy_program(program)
    roles = tuple(
        Role(RoleKind.INPUT, f"tangent of {role.name}") if role.kind is RoleKind.TANGENT else role for role in copy.signature.inputs
    )
    for node, role in zip(copy.placeholders, roles, strict=True):
        annotate(node, role=role)
    return copy.replace(signature=Signature(inputs=roles, outputs=copy.signature.outputs))


def _specs(values: Sequence[Value]) -> tuple[ValueSpec, ...]:
    return tuple(ValueSpec(value.name, value.shape, value.dtype, value.stride) for value in values)


def held_by(stage: StageProgram, tensors: Mapping[Port, torch.Tensor]) -> dict[Port, torch.Tensor]:
    """Of all tensors of a step, those that the stage's parts read; constants come from the programs themselves."""
    found: dict[Port, torch.Tensor] = {}
    for part in stage.parts:
        for role in part.program.signature.inputs:
            port = Port(role.kind.value, role.name)
            if role.kind is RoleKind.CONSTANT:
                found[port] = part.program.constants[role.name]
            elif port.kind in HELD:
                found[port] = tensors[port]
        for role in part.program.signature.outputs:
            same = [p for p in tensors if role.kind is RoleKind.UPDATE and p.kind in HELD and p.name == role.name]
            found.update((p, tensors[p]) for p in same)
    return found


def states_of(
    pipeline: Pipeline, tensors: Mapping[Port, torch.Tensor], *, products: bool = False, joined: int = 1
) -> list[StageState]:
    """All stages ready to run in this process. tensors: parameters, buffers and optimizer state of the model, by port; joined: see
    ``StageState``."""
    return [
        StageState(code, held_by(stage, tensors), joined=joined)
        for code, stage in zip(stage_codes(pipeline, products=products), pipeline.stages, strict=True)
    ]
