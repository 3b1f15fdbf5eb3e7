"""Can the ranks run to the end together?

A single program for all ranks has the same collectives in the same order everywhere, and the types check that its pieces fit.
Programs that differ between ranks are played against each other without tensors: see ``runtime.matching``.
"""

from __future__ import annotations

from collections.abc import Sequence

from ....runtime.matching import match_collectives
from ...emit import emit
from ...errors import InputError
from ...program import Program


def match_programs(programs: Program | Sequence[Program]) -> None:
    """Raise CollectiveMismatch, naming two ranks and their lines, where ranks disagree or would wait for each other for ever.

    programs: one for all ranks of its mesh, or one per rank in rank order.
    """
    listed = [programs] if isinstance(programs, Program) else list(programs)
    if not listed or any(program.mesh is None for program in listed):
        raise InputError("expected programs lowered to a mesh, found none or a logical one")
    emitted = {id(program): emit(program) for program in listed}
    match_collectives(emitted[id(listed[0])] if isinstance(programs, Program) else [emitted[id(p)] for p in listed])
