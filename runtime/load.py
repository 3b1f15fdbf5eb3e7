"""From instruction list to callables on one rank: ops resolved, rank-dependent integers folded, argument lists ready.

A frame is a list of values: the slots of the program, followed by its constants. So nearly every argument, constant or not, is a
position in the frame, and a call is ``call(*itemgetter(*positions)(frame))`` without building arguments in Python. Ops with slots
inside lists or keywords (``cat``) get a small wrapper that puts flat values into place.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .collector import without_collector
from .errors import ProgramError
from .instruction import CallForm, Instruction
from .ops import COLLECTIVES, WAIT, resolve
from .program import RankProgram
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


@without_collector()
def load(
    program: RankProgram, rank: int, *, device: torch.device | None = None, floating: torch.dtype | None = None
) -> LoadedProgram:
    """Make a program ready for one rank.

    device: stands for every device in the program; floating: stands for every floating dtype in it (``torch.float64`` to check
    numerics). ProgramError when an op is unknown or an argument malformed.
    """
    loader = _Loader(program, Site.of(program.mesh, rank, device, floating))
    try:
        steps = tuple(loader.steps(program.instructions))
    except (TypeError, ValueError, LookupError) as error:
        raise ProgramError(f"an argument of the program is malformed: {error!r}") from error
    return LoadedProgram(program, rank, loader.site, steps, tuple(loader.constants), loader.varying, loader.loops)


class _Prepared(NamedTuple):
    """What all instructions of one form share.

    pick: from the slots an instruction reads, followed by ``constants`` (positions in the frame), its inputs in the order of the
    call; None where its inputs are what it reads.
    """

    kind: str
    call: Callable[..., Any] | None
    constants: tuple[int, ...]
    pick: Callable[[tuple[int, ...]], tuple[int, ...]] | None
    spread: bool


class _Loader:
    def __init__(self, program: RankProgram, site: Site) -> None:
        self.site = site
        self.slots = program.slots
        self.constants: list[Any] = []
        self.varying: dict[int, Any] = {}
        self.loops: dict[int, TileLoop] = {}
        self._interned: dict[tuple[type, Any], int] = {}

    def steps(self, instructions: Sequence[Instruction]) -> Iterator[Step]:
        """One step per instruction."""
        prepared: dict[int, _Prepared] = {}  # forms live as long as their instructions
        new = tuple.__new__  # as Step._make does, without its call
        for index, (form, reads, outputs, frees, _) in enumerate(instructions):
            known = prepared.get(id(form))
            if known is None:
                known = prepared[id(form)] = self._prepare(form)
            kind, call, constants, pick, spread = known
            inputs = reads if pick is None else pick(reads + constants)
            if kind is TILES:
                self.loops[index] = read_tile_loop(*form.args[1:])
            output, several = (-1, outputs) if spread else (outputs[0], ())
            yield new(Step, (index, kind, call, inputs, output, several, frees))

    def _prepare(self, form: CallForm) -> _Prepared:
        collective = COLLECTIVES.get(form.op)
        call: Callable[..., Any] | None = None
        if collective is not None:
            kind, templates = collective.method, [form.args[i] for i in collective.arguments]
        elif form.op == WAIT:
            kind, templates = WAITING, form.args
        elif form.op == TILE_LOOP:
            kind, templates = TILES, form.args[0]
        else:
            kind = COMPUTE
            call, templates = self._callable(form)
        constants: list[int] = []
        order = [self._place(template, form.places, constants) for template in templates]
        if order == list(range(form.places)):
            return _Prepared(kind, call, (), None, form.spread > 0)
        return _Prepared(kind, call, tuple(constants), _picker(order), form.spread > 0)

    def _place(self, template: Any, places: int, constants: list[int]) -> int:
        """Where the value of a flat template lies among the slots and constants of an instruction."""
        if type(template) is dict and "slot" in template:
            place: int = template["slot"]
            return place
        constants.append(self._position(template))
        return places + len(constants) - 1

    def _callable(self, form: CallForm) -> tuple[Callable[..., Any], list[Any]]:
        """The function of a COMPUTE step and the flat templates it takes."""
        call = resolve(form.op)
        named = form.kwargs.values()
        if not any(type(template) is list and _has_slot(template) for template in form.args):
            if not form.kwargs:
                return call, form.args
            if not any(_has_slot(template) or is_rank_dependent(template) for template in named):
                return functools.partial(call, **{name: fold(t, self.site) for name, t in form.kwargs.items()}), form.args
        return _wrapped(call, form)

    def _position(self, template: Any) -> int:
        """Where a constant lies in the frame."""
        kind = type(template)
        key = (kind, template if kind is int or kind is str else repr(template))  # repr: 0.0 and -0.0 are equal, lists have no hash
        known = self._interned.get(key)
        if known is None:
            known = self._interned[key] = self.slots + len(self.constants)
            self.constants.append(fold(template, self.site))
            if is_rank_dependent(template):
                self.varying[known] = template
        return known


def _picker(order: list[int]) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    if len(order) > 1:
        return operator.itemgetter(*order)
    return operator.itemgetter(slice(order[0], order[0] + 1) if order else slice(0))


def _wrapped(call: Callable[..., Any], form: CallForm) -> tuple[Callable[..., Any], list[Any]]:
    """``call`` behind a function of flat values, for slots in nested lists and anything unusual in keywords; and its templates."""
    flat: list[Any] = []
    build_args = [_builder(template, flat) for template in form.args]
    build_kwargs = {name: _builder(template, flat) for name, template in form.kwargs.items()}

    def wrapped(*values: Any) -> Any:
        return call(*[build(values) for build in build_args], **{name: build(values) for name, build in build_kwargs.items()})

    return wrapped, flat


def _builder(template: Any, flat: list[Any]) -> Callable[[tuple[Any, ...]], Any]:
    """A function from the flat values of a call to one argument; appends the templates of the values it takes."""
    start = len(flat)
    if not isinstance(template, list) or not _has_slot(template):
        flat.append(template)
        return lambda values: values[start]
    if all(isinstance(item, dict) and "slot" in item for item in template):
        flat.extend(template)
        stop = len(flat)
        return lambda values: list(values[start:stop])
    items = [_builder(item, flat) for item in template]
    return lambda values: [item(values) for item in items]


def _has_slot(template: Any) -> bool:
    if isinstance(template, dict):
        return "slot" in template
    return isinstance(template, list) and any(map(_has_slot, template))
