"""The exact run: a lowered program on the real engine, with integers in place of its floating point values.

The other levels prove that the lowered program is the original. This one shows that the engine runs it: emission, executor,
buffers, order, transport. Every tensor of floats becomes one of 64-bit integers, every op an exact function of them:

    ops that are exact on integers modulo 2^64 (sums, products, matrix products, moves, gathers)     themselves
    all other ops                                                                                    a keyed hash of all arguments

The program keeps its nodes, ports, slots and collectives. Its results on the ranks are compared, bit for bit, with those of all
ranks in lockstep in this process: a message lost or late, a buffer reused too early, a wrong order changes them.
"""

from __future__ import annotations

import operator
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ...runtime import stand_in
from ...runtime.engines.base import Engine
from ...runtime.program import RankProgram
from ..emit import emit
from ..errors import RunError
from ..layout import Shard
from ..program import Program, Role, RoleKind, copy_program, note, tensor_leaves
from .levels import work
from .lockstep import run_ranks
from .lowered import with_whole_inputs
from .report import LevelResult, Outcome, Status
from .ring.cones import POLYNOMIAL
from .samples import sample_inputs
from .together import is_collective

BOUND = frozenset((RoleKind.PARAM, RoleKind.BUFFER, RoleKind.STATE, RoleKind.CONSTANT))
"""Inputs that keep their tensor from call to call."""

MAX_WORK = 1e9
"""Integer products have no fast kernels: a second or so."""

STEPS = 2
"""Forwards that are alive at the same time, so that a value saved for one backward and overwritten by the next forward shows."""


def canary_level(lowered: Program, engine: Engine, *, seed: int = 0) -> LevelResult:
    """Run the program on the engine with integers; FAILED names the results that are not those of the lockstep run."""
    start = time.process_time()
    reason = _cannot(lowered)
    if lowered.mesh is None:
        reason = "the program is not lowered to a mesh"
    elif work(lowered) * engine.mesh.size > MAX_WORK:
        reason = f"more than {MAX_WORK:g} multiply-adds of integers at these sizes, and no smaller ones are known"
    if reason:
        return LevelResult("canary", Outcome.SKIPPED, reason)
    program = with_integers(lowered)
    try:
        wrong = _Run(lowered, program, emit(program), engine, seed).differences()
    except RunError as error:
        return LevelResult("canary", Outcome.FAILED, f"the ranks failed: {error}", time.process_time() - start)
    seconds = time.process_time() - start
    calls = sum(node.op == "call_function" for node in program.nodes)
    if wrong:
        detail = f"on the ranks of {type(engine).__name__}, {'; '.join(wrong[:4])}" + (
            f" and {len(wrong) - 4} more" if wrong[4:] else ""
        )
        return LevelResult("canary", Outcome.FAILED, detail, seconds, Status.DIFFERENT, divergence=wrong[0])
    detail = (
        f"{type(engine).__name__} ran {calls} ops on {engine.mesh.size} ranks, {STEPS} steps, every result exactly as in lockstep "
        f"({_kept(lowered, program)} ops as themselves, the others as keyed functions)"
    )
    return LevelResult("canary", Outcome.PASSED, detail, seconds)


def _cannot(program: Program) -> str:
    for node in program.nodes:
        for layout, shape in zip(note(node).layouts or (), note(node).global_shapes or (), strict=False):
            if layout is None or shape is None or program.mesh is None:
                continue
            for placement, size in zip(layout, program.mesh.shape, strict=True):
                if isinstance(placement, Shard) and shape[placement.dim] % size:
                    return f"{node.name} lies unevenly over the ranks, and a keyed function has one size: choose sizes that divide"
    return ""


def _kept(lowered: Program, program: Program) -> int:
    return sum(a.op == "call_function" and a.target is b.target for a, b in zip(lowered.nodes, program.nodes, strict=True))


# ---- the program on integers -----------------------------------------------------------------------------------------------------


def with_integers(program: Program) -> Program:
    """The program with int64 for every float: the same nodes in the same order."""
    stand_in.define()
    new, mapping = copy_program(program)
    back = {made: old for old, made in mapping.items()}
    for key, node in enumerate(list(new.graph.graph.nodes)):
        if node.op == "placeholder":
            node.meta["val"] = _integer_like(back[node].meta["val"])
        elif node.op == "call_function":
            _rewrite(node, back[node], key + 1)
    constants = {name: _constant(value, name) for name, value in program.constants.items()}
    return new.replace(constants=constants)


def _rewrite(node: fx.Node, old: fx.Node, key: int) -> None:
    """Make a node compute on integers. ``old`` is the same node on floats."""
    value = old.meta.get("val")
    if node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
        node.meta["val"] = _integer_like(value)
        return
    if is_collective(node.target):
        node.args = tuple("sum" if arg == "avg" else arg for arg in node.args)  # an average of integers is none
        node.meta["val"] = _integer_like(value)
        return
    wanted = node.meta["val"] = _integer_like(value)
    if not any(_has_floats(one) for one in (value, *(source.meta.get("val") for source in old.all_input_nodes))):
        return
    args, kwargs = _integer_arguments(node.args, key), _integer_arguments(dict(node.kwargs), key)
    found = _trial(node.target, args, kwargs) if node.target.overloadpacket in POLYNOMIAL else None
    if found is not None and _same_forms(found, wanted):
        node.args, node.kwargs = args, kwargs
        return
    values = [source for source in node.all_input_nodes if isinstance(source.meta["val"], torch.Tensor)]
    leaves = [leaf if isinstance(leaf, torch.Tensor) else torch.empty(0) for leaf in tensor_leaves(value)]  # None: nobody reads it
    sizes, strides = [list(map(int, leaf.shape)) for leaf in leaves], [list(map(int, leaf.stride())) for leaf in leaves]
    kinds = [stand_in.kind_of(leaf.dtype) for leaf in leaves]
    if isinstance(value, torch.Tensor):
        node.target, node.args = torch.ops.hocket.stand_in.default, (values, key, sizes[0], strides[0], kinds[0])
    else:
        ranks = [len(size) for size in sizes]
        node.target = torch.ops.hocket.stand_ins.default
        node.args = (values, key, [n for s in sizes for n in s], [n for s in strides for n in s], ranks, kinds)
    node.kwargs = {}


def _integer_like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        dtype = torch.int64 if value.is_floating_point() or value.is_complex() else value.dtype
        return torch.empty_strided(tuple(value.shape), tuple(value.stride()), dtype=dtype, device="meta")
    if isinstance(value, (list, tuple)):
        return [_integer_like(item) for item in value]
    return value


def _has_floats(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in tensor_leaves(value))


def _integer_arguments(argument: Any, key: int) -> Any:
    """Float literals become odd integers of their own; float dtypes int64."""
    if isinstance(argument, float):
        return zlib.crc32(f"{key} {argument!r}".encode()) | 1
    if isinstance(argument, torch.dtype):
        return torch.int64 if argument.is_floating_point or argument.is_complex else argument
    if isinstance(argument, (list, tuple)):
        return type(argument)(_integer_arguments(item, key) for item in argument)
    if isinstance(argument, dict):
        return {name: _integer_arguments(item, key) for name, item in argument.items()}
    return argument


def _trial(target: Any, args: Any, kwargs: Any) -> Any:
    """What the op makes of integer zeros of these shapes; None where it refuses them."""

    def zeros(node: fx.Node) -> Any:
        value = node.meta["val"]
        return torch.zeros(tuple(value.shape), dtype=value.dtype) if isinstance(value, torch.Tensor) else value

    try:
        return target(*fx.node.map_arg(args, zeros), **fx.node.map_arg(kwargs, zeros))
    except Exception:  # an op without an integer kernel is stood in for
        return None


def _same_forms(found: Any, wanted: Any) -> bool:
    a, b = tensor_leaves(found), tensor_leaves(wanted)
    return len(a) == len(b) and all(
        isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.shape == y.shape and x.dtype == y.dtype
        for x, y in zip(a, b, strict=True)
    )


def _constant(value: torch.Tensor, name: str) -> torch.Tensor:
    if not (value.is_floating_point() or value.is_complex()):
        return value
    return random_integers(tuple(value.shape), torch.Generator().manual_seed(zlib.crc32(name.encode())))


def random_integers(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Any 63-bit integers."""
    return torch.randint(-(1 << 62), 1 << 62, tuple(shape), generator=generator)


# ---- the run ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    lowered: Program
    program: Program
    instructions: RankProgram
    engine: Engine
    seed: int

    def differences(self) -> list[str]:
        """Results of the engine that differ, in words."""
        sampled = [self._inputs(self.seed + step) for step in range(STEPS)]
        state = {role: value for role, value in sampled[0].items() if role.kind in BOUND}
        bound = {(str(role.kind), role.name): value.clone() for role, value in state.items()}
        handle = self.engine.load(self.instructions, bound)
        try:
            return self._steps(handle, state, sampled)
        finally:
            unload = getattr(self.engine, "unload", None)
            if unload is not None:
                unload(handle)

    def _steps(self, handle: Any, state: dict[Role, torch.Tensor], sampled: Sequence[Mapping[Role, torch.Tensor]]) -> list[str]:
        first, *rest = self.instructions.segments
        roles = self.program.signature
        wrong: list[str] = []
        pending: list[tuple[Any, dict[Role, torch.Tensor | None], Mapping[Role, torch.Tensor]]] = []
        changes = any(roles.outputs[port].kind is RoleKind.UPDATE for port, _ in first.results)
        for step, inputs in enumerate(sampled):
            given = {**inputs, **state}
            expected = run_ranks(self.program, given, check_replicas=False).outputs
            unbound = [roles.inputs[port] for port in first.inputs if roles.inputs[port].kind not in BOUND]
            ticket, found = self.engine.forward(handle, [given[role].clone() for role in unbound])
            wrong += self._compare(f"step {step}, {first.name}", [port for port, _ in first.results], found, expected)
            self._update(state, expected, [port for port, _ in first.results])
            pending.append((ticket, expected, given))
            if changes:  # the next forward may not run before this backward
                wrong += self._backward(handle, rest, pending, step)
        wrong += self._backward(handle, rest, pending, len(sampled) - 1)
        return wrong

    def _backward(self, handle: Any, rest: Sequence[Any], pending: list[Any], step: int) -> list[str]:
        wrong: list[str] = []
        for ticket, expected, given in pending:
            if rest:
                ports = [port for port, _ in rest[0].results]
                tangents = [given[self.program.signature.inputs[port]].clone() for port in rest[0].inputs]
                found = self.engine.backward(handle, ticket, tangents)
                wrong += self._compare(f"step {step}, {rest[0].name}", ports, found, expected)
            else:
                self.engine.release(ticket)
        pending.clear()
        return wrong

    def _update(self, state: dict[Role, torch.Tensor], made: Mapping[Role, torch.Tensor | None], ports: Sequence[int]) -> None:
        for port in ports:
            role = self.program.signature.outputs[port]
            value = made[role]
            if role.kind is RoleKind.UPDATE and value is not None:
                for held in state:
                    if held.name == role.name and held.kind is not RoleKind.CONSTANT:
                        state[held] = value

    def _compare(
        self, where: str, ports: Sequence[int], found: Sequence[torch.Tensor | None], expected: Mapping[Role, torch.Tensor | None]
    ) -> list[str]:
        wrong = []
        for port, value in zip(ports, found, strict=True):
            role = self.program.signature.outputs[port]
            true = expected[role]
            if (value is None) != (true is None):
                wrong.append(f"{role} ({where}) exists on one side only")
            elif value is not None and true is not None and not torch.equal(value.cpu(), true):
                count = int((value.cpu() != true).sum()) if value.shape == true.shape else true.numel()
                wrong.append(f"{role} ({where}) differs in {count} of {true.numel()} entries")
        return wrong

    def _inputs(self, seed: int) -> dict[Role, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        drawn = sample_inputs(with_whole_inputs(self.lowered), seed)
        found: dict[Role, torch.Tensor] = {}
        for port, role in zip(self.instructions.inputs, self.program.signature.inputs, strict=True):
            if role.kind is RoleKind.CONSTANT:
                found[role] = self.program.constants[role.name]
            else:
                found[role] = random_integers(port.shape, generator) if _has_floats(drawn[role]) else drawn[role]
        return found
