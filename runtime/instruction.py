"""One instruction of a program: what it calls, and the slots it touches.

Programs repeat themselves: the layers of a model are the same calls on other slots. So an instruction is a ``CallForm`` (the call
with numbered places for its slots) and plain integers; whatever is to be checked or prepared about the call is done once per form.

    form          aten.mul.Tensor(place 0, place 1)
    instructions  reads (80, 86) writes (87,);  reads (87, 1) writes (88,)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class CallForm(NamedTuple):
    """A call without its slots.

    args, kwargs: templates (see ``templates``) in which ``{"slot": k}`` stands for the k-th slot that the instruction reads,
    numbered in the order in which they appear; spread: elements of a result that is several tensors, 0 for one tensor; phase: as
    ``Phase`` has them; places: how many slots the instruction reads.
    """

    op: str
    args: list[Any]
    kwargs: dict[str, Any]
    spread: int
    phase: str
    places: int

    @classmethod
    def of(
        cls, op: str, args: Sequence[Any], kwargs: Mapping[str, Any], spread: int, phase: str
    ) -> tuple[CallForm, tuple[int, ...]]:
        """The form of a call whose templates name slots, and those slots in order."""
        reads: list[int] = []
        words = [_numbered(template, reads) for template in args]
        named = {name: _numbered(kwargs[name], reads) for name in sorted(kwargs)}
        return cls(op, words, named, spread, phase, len(reads)), tuple(reads)


class Instruction(NamedTuple):
    """One call.

    reads: the slots at the places of the form; outputs: ``(slot,)`` for an op that returns one tensor; for an op that returns
    several, one slot per element, -1 for an element nobody reads; frees: slots nobody reads from here on; location: index into
    ``RankProgram.locations``.
    """

    form: CallForm
    reads: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...]
    location: int

    @property
    def op(self) -> str:
        """The name of the op, as ``ops.op_name`` writes it."""
        return self.form.op

    @property
    def args(self) -> list[Any]:
        """The positional arguments as templates that name slots; a new list every time."""
        return [_filled(template, self.reads) for template in self.form.args]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments as templates that name slots; a new dictionary every time."""
        return {name: _filled(template, self.reads) for name, template in self.form.kwargs.items()}

    @property
    def spread(self) -> bool:
        """Whether the op returns several tensors."""
        return self.form.spread > 0

    @property
    def phase(self) -> str:
        """``forward``, ``backward``, ..."""
        return self.form.phase

    def calling(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Instruction:
        """Another call with the outputs and frees of this one; ``args`` and ``kwargs`` name slots."""
        form, reads = CallForm.of(op, args, kwargs or {}, self.form.spread, self.form.phase)
        return self._replace(form=form, reads=reads)


def _numbered(template: Any, reads: list[int]) -> Any:
    kind = type(template)
    if kind is dict and "slot" in template:
        reads.append(template["slot"])
        return {"slot": len(reads) - 1}
    return [_numbered(item, reads) for item in template] if kind is list else template


def _filled(template: Any, reads: tuple[int, ...]) -> Any:
    kind = type(template)
    if kind is dict and "slot" in template:
        return {"slot": reads[template["slot"]]}
    return [_filled(item, reads) for item in template] if kind is list else template
