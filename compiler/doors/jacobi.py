"""The tactic ``hocket.Jacobi()``: recurrences are found, and solved in parallel where that pays."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from ...passes.chain.jacobi import JacobiFeedforward
from ..chains.bodies import How
from ..chains.cells import recurrences
from ..contract import Pass
from ..plan.tactics import RewriteTactic, Tactic, TimeParallel


@dataclass(frozen=True)
class Jacobi(RewriteTactic):
    """Solve the recurrences of a model in parallel: ``tactics=[hocket.Jacobi()]``.

    Recurrent layers of torch, regions written with ``hocket.sequential`` and loops that were unrolled become chains; what a step
    computes without the state is done for all steps at once; the rest is solved by fixed-point iteration where that is measured to
    be cheaper than the loop. Placements stay as the other tactics leave them.

    solver: "auto" (the first call runs the loop and measures), or "blocks:64", "jacobi", "windows:32", "shooting:32", "newton",
    "sequential". exact: "rounding" (differences of a few units in the last place), "bitwise", or a relative tolerance.
    find: also look for chains in unrolled loops. axis: a mesh axis whose ranks take a segment of time each
    (``parallelize(model, "t=2", args, tactics=[Jacobi(axis="t")])``). Raises InputError for a solver or an exactness that does not
    exist.
    """

    solver: str = "auto"
    exact: str | float = "rounding"
    find: bool = True
    axis: str = ""

    def __post_init__(self) -> None:
        How.parse(self.solver, self.exact)

    def rewrites_before(self) -> tuple[Pass, ...]:
        """The one pass."""
        return (JacobiFeedforward(self.solver, self.exact, self.find, axis=self.axis),)

    def places(self) -> tuple[Tactic, ...]:
        """Segments lie over the ranks of the axis."""
        return (TimeParallel(self.axis),) if self.axis else ()

    def while_capturing(self) -> contextlib.AbstractContextManager[object]:
        """Recurrent layers are captured as chains, not unrolled."""
        return recurrences()
