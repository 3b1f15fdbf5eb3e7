"""From instruction list to callables on one rank: ops resolved, rank-dependent integers folded, argument lists ready.

A frame is a list of values: the slots of the program, followed by its constants. So nearly every argument, constant or not, is a
position in the frame, and a call is ``call(*itemgetter(*positions)(frame))`` without building arguments in Python. Ops with slots
inside lists or keywords (``cat``) get a small wrapper that puts flat values into place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .errors import ProgramError
from .ops import COLLECTIVES, WAIT, resolve
from .program import Instruction, RankProgram
from .templates import Site, fold, is_rank_dependent
from .tile_loop import TILE_LOOP, TileLoop, read_tile_loop

COMPUTE, WAITING, TILES = "compute", "wait", "tiles"
"""Kinds of a step; the other kinds are methods of ``Communicator``."""


class Step(NamedTuple):
    """One instruction on one rank.

    kind: COMPUTE, WAITING, TILES (one of ``LoadedProgram.loops``) or a method of ``Communicator``; call: the function of a COMPUTE
    step, None otherwise; inputs: positions in the frame; output: the slot of the result, -1 when the result is spread over
    ``spread``; frees: slots to drop afterwards.
    """

    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    kind: str
    call: Callable[..., Any] | None
    inputs: tuple[int, ...]
    output: int
    spread: tuple[int, ...]
    frees: tuple[int, ...]


@dataclass(frozen=True)
class LoadedProgram:
    """A program made ready for one rank.

    steps: one per instruction; constants: the values at frame positions ``program.slots`` and up, as this rank has them; varying:
    the templates of those that differ between ranks, by position; loops: the tile loops, by instruction.
    """

    program: RankProgram
    rank: int
    site: Site
    steps: tuple[Step, ...]
    constants: tuple[Any, ...]
    varying: dict[int, Any]
    loops: dict[int, TileLoop]

    def new_frame(self) -> list[Any]:
        """Values of an empty frame: no slot is set, constants are in place."""
        return [None] * self.program.slots + list(self.constants)


def load(
    program: RankProgram, rank: int, *, device: torch.device | None = None, floating: torch.dtype | None = None
) -> LoadedProgram:
    """Make a program ready for one rank.

    device: stands for every device in the program; floating: stands for every floating dtype in it (``torch.float64`` to check
    numerics). ProgramError when an op is unknown or an argument malformed.
    """
    loader = _Loader(program, Site.of(program.mesh, rank, device, floating))
    try:
        steps = tuple(loader.step(index, ins) for index, ins in enumerate(program.instructions))
    except TypeError as error:
        raise ProgramError(f"an argument of the program is malformed: {error}") from error
    return LoadedProgram(program, rank, loader.site, steps, tuple(loader.constants), loader.varying, loader.loops)


class _Loader:
    def __init__(self, program: RankProgram, site: Site) -> None:
        self.site = site
        self.slots = program.slots
        self.constants: list[Any] = []
        self.varying: dict[int, Any] = {}
        self.loops: dict[int, TileLoop] = {}
        self._interned: dict[tuple[type, Any], int] = {}
        self._bound: dict[tuple[str, str], Callable[..., Any]] = {}

    def step(self, index: int, ins: Instruction) -> Step:
        output, spread = (-1, ins.outputs) if ins.spread else (ins.outputs[0], ())
        collective = COLLECTIVES.get(ins.op)
        if collective is not None:
            inputs = tuple(self._position(ins.args[i]) for i in collective.arguments)
            return Step(index, collective.method, None, inputs, output, spread, ins.frees)
        if ins.op == WAIT:
            return Step(index, WAITING, None, (self._position(ins.args[0]),), output, spread, ins.frees)
        if ins.op == TILE_LOOP:
            operands, *words = ins.args
            self.loops[index] = read_tile_loop(*words)
            return Step(index, TILES, None, tuple(self._position(t) for t in operands), output, spread, ins.frees)
        call = resolve(ins.op)
        positions = self._flat_positions(ins.args)
        if positions is not None and ins.kwargs:
            call, positions = self._with_keywords(call, ins, positions)
        if positions is None:
            call, positions = self._wrapped(call, ins)
        return Step(index, COMPUTE, call, tuple(positions), output, spread, ins.frees)

    def _flat_positions(self, args: list[Any]) -> list[int] | None:
        """Where each argument lies in the frame; None when one of them has slots inside a list."""
        positions: list[int] = []
        for template in args:
            if type(template) is dict and "slot" in template:
                positions.append(template["slot"])
            elif type(template) is list and _has_slot(template):
                return None
            else:
                positions.append(self._position(template))
        return positions

    def _with_keywords(
        self, call: Callable[..., Any], ins: Instruction, positions: list[int]
    ) -> tuple[Callable[..., Any], list[int] | None]:
        """``call`` with its constant keywords bound; positions become None when a keyword is not the same on all ranks."""
        key = (ins.op, repr(ins.kwargs))
        known = self._bound.get(key)
        if known is None:
            if any(_has_slot(t) or is_rank_dependent(t) for t in ins.kwargs.values()):
                return call, None
            known = functools.partial(call, **{name: fold(t, self.site) for name, t in ins.kwargs.items()})
            self._bound[key] = known
        return known, positions

    def _wrapped(self, call: Callable[..., Any], ins: Instruction) -> tuple[Callable[..., Any], list[int]]:
        """``call`` behind a function of flat values, for slots in nested lists and anything unusual in keywords."""
        positions: list[int] = []
        build_args = [self._builder(template, positions) for template in ins.args]
        build_kwargs = {name: self._builder(template, positions) for name, template in ins.kwargs.items()}

        def wrapped(*flat: Any) -> Any:
            return call(*[build(flat) for build in build_args], **{name: build(flat) for name, build in build_kwargs.items()})

        return wrapped, positions

    def _builder(self, template: Any, positions: list[int]) -> Callable[[tuple[Any, ...]], Any]:
        """A function from the flat values of an instruction to one argument; appends the positions it reads."""
        start = len(positions)
        if self._is_flat(template):
            positions.append(self._position(template))
            return lambda flat: flat[start]
        if all(isinstance(item, dict) and "slot" in item for item in template):
            positions.extend(item["slot"] for item in template)
            stop = len(positions)
            return lambda flat: list(flat[start:stop])
        items = [self._builder(item, positions) for item in template]
        return lambda flat: [item(flat) for item in items]

    def _is_flat(self, template: Any) -> bool:
        """Whether a template is one position of the frame: a slot, or a constant."""
        return not isinstance(template, list) or not _has_slot(template)

    def _position(self, template: Any) -> int:
        kind = type(template)
        if kind is dict and "slot" in template:
            slot: int = template["slot"]
            return slot
        key = (kind, template if kind is int or kind is str else repr(template))  # repr: 0.0 and -0.0 are equal, lists have no hash
        known = self._interned.get(key)
        if known is None:
            known = self._interned[key] = self.slots + len(self.constants)
            self.constants.append(fold(template, self.site))
            if is_rank_dependent(template):
                self.varying[known] = template
        return known


def _has_slot(template: Any) -> bool:
    if isinstance(template, dict):
        return "slot" in template
    return isinstance(template, list) and any(map(_has_slot, template))
