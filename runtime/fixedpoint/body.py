"""The body of a chain as data: the instructions of one step, with no code in it.

    (carries c, shared s, one slice x of every stream)  ->  (next carries, emits)

A body is a small instruction list of the same templates as a ``RankProgram`` (``runtime.templates``): op names from the same
allow-list, slots, constants. It travels as a JSON string inside one argument of the ``hocket::chain`` op, so a chain is an ordinary
instruction of an ordinary program, and a rank that reads one can run nothing but functional tensor ops.

    slots   0 ..            the carries, then the shared values, then the streams, in order; then what the calls write, in order
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import ProgramError
from ..instruction import CallForm, Instruction
from ..mesh import Mesh
from ..ops import COLLECTIVES, WAIT, is_random, overload_of
from ..program import RankProgram, encode
from ..templates import is_rank_dependent, slots_in

FORMAT = 1
MAX_CALLS = 1 << 16


class Call(NamedTuple):
    """One op of a body. outputs: the slot of its tensor; of each of its tensors, -1 where nobody reads it, if ``spread``."""

    op: str
    args: list[Any]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    spread: bool


@dataclass(frozen=True)
class Body:
    """See the module.

    carries, shared, streams: how many of each go in; calls: in order; following: the slot of each next carry; emits: the slots of
    what a step gives out; rows: whether dimension 0 of every carry, stream slice and emit counts independent rows, however many
    (so that many steps can be evaluated as one with more rows); floating: the floating dtype that its dtype constants stand for.
    """

    carries: int
    shared: int
    streams: int
    calls: tuple[Call, ...]
    following: tuple[int, ...]
    emits: tuple[int, ...]
    rows: bool = False
    floating: str = "float32"

    @property
    def inputs(self) -> int:
        """Number of input slots."""
        return self.carries + self.shared + self.streams

    @functools.cached_property
    def slots(self) -> int:
        """Number of slots."""
        return self.inputs + sum(slot >= 0 for call in self.calls for slot in call.outputs)

    @functools.cached_property
    def text(self) -> str:
        """``to_json``, once."""
        return self.to_json()

    def to_json(self) -> str:
        """Deterministic text; ``read_body`` restores an equal body."""
        return encode(
            {
                "format": FORMAT,
                "inputs": [self.carries, self.shared, self.streams],
                "calls": [[c.op, c.args, c.kwargs, list(c.outputs), c.spread] for c in self.calls],
                "following": list(self.following),
                "emits": list(self.emits),
                "rows": self.rows,
                "floating": self.floating,
            }
        )

    def needed(self, results: Sequence[int]) -> tuple[Call, ...]:
        """The calls that some slots depend on."""
        wanted, kept = set(results), []
        for call in reversed(self.calls):
            if wanted.intersection(slot for slot in call.outputs if slot >= 0):
                kept.append(call)
                wanted.update(slots_in(call.args), slots_in(call.kwargs.values()))
        return tuple(reversed(kept))

    def as_program(self, calls: Sequence[Call]) -> RankProgram:
        """Some of the calls as a program of one rank, for the loader."""
        instructions = []
        for call in calls:
            form, reads = CallForm.of(call.op, call.args, call.kwargs, len(call.outputs) if call.spread else 0, "forward")
            instructions.append(Instruction(form, reads, call.outputs, (), 0))
        return RankProgram(Mesh((("one", 1),)), (), (), tuple(instructions), (), ("",), (), self.slots)

    @property
    def dtype(self) -> torch.dtype:
        """``floating`` as torch has it."""
        found = getattr(torch, self.floating, None)
        if not isinstance(found, torch.dtype):
            raise ProgramError(f"the body of a chain names the dtype {self.floating!r}, which torch does not have")
        return found


@functools.lru_cache(maxsize=512)
def read_body(text: str) -> Body:
    """The body in ``text``, checked: ProgramError names the first thing that a body must not be."""
    try:
        raw = json.loads(text)
        carries, shared, streams = raw["inputs"]
        calls = tuple(Call(op, args, kwargs, tuple(outputs), spread) for op, args, kwargs, outputs, spread in raw["calls"])
        body = Body(carries, shared, streams, calls, tuple(raw["following"]), tuple(raw["emits"]), raw["rows"], raw["floating"])
        version = raw["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProgramError(f"the body of a chain is malformed: {error}") from error
    if version != FORMAT:
        raise ProgramError(f"the body of a chain has format {version}, this hocket reads {FORMAT}")
    check_body(body)
    return body


def check_body(body: Body) -> None:
    """Raise ProgramError unless every op is allowed, pure and of one rank, and every slot is written once, before it is read."""
    counts = (body.carries, body.shared, body.streams)
    if not all(type(n) is int and n >= 0 for n in counts) or body.carries < 1 or len(body.calls) > MAX_CALLS:
        raise ProgramError(f"a chain has at least one carry and at most {MAX_CALLS} calls, found {counts} and {len(body.calls)}")
    written = set(range(body.inputs))
    for call in body.calls:
        _check_call(call)
        unknown = [slot for slot in (*slots_in(call.args), *slots_in(call.kwargs.values())) if slot not in written]
        fresh = [slot for slot in call.outputs if slot != -1]
        if unknown or written.intersection(fresh) or (not call.spread and len(call.outputs) != 1):
            raise ProgramError(f"{call.op} in the body of a chain reads slots {unknown} before they exist, or writes {fresh} again")
        written.update(fresh)
    if written != set(range(body.slots)) or len(body.following) != body.carries:
        raise ProgramError("the body of a chain must number its slots in order and give every carry its next value")
    if not {*body.following, *body.emits} <= written:
        raise ProgramError("the body of a chain gives out a slot that nothing writes")


def _check_call(call: Call) -> None:
    if call.op in COLLECTIVES or call.op == WAIT:
        raise ProgramError(f"{call.op} cannot be in the body of a chain: how often it runs depends on values, so ranks would wait")
    overload_of(call.op)
    if is_random(call.op):
        raise ProgramError(f"{call.op} cannot be in the body of a chain: it draws hidden random numbers; make them a stream")
    if is_rank_dependent(call.args) or any(map(is_rank_dependent, call.kwargs.values())):
        raise ProgramError(f"{call.op} in the body of a chain depends on the rank")
