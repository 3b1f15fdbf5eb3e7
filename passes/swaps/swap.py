"""Trade a collective beside a product for one that takes less time: the sum for the factors, or the factors for the sum.

    all_gather_k(x) @ w     <->     all_reduce(x_r @ w_r)        what is multiplied is gathered, or what comes out is added up

Both sides are the same sum of products (``partial_product``: to the right, ``gathered_factors``: to the left), so bytes and time
decide. Which side of a layer a plan writes follows from where it puts values, one op at a time; here the two ops are seen together.
The terms of a sum are added in another order (``reordered_sum``): equal in the reals, and to rounding in floating point.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.fx as fx

from ...compiler.contract import Context, Contract, Equal
from ...compiler.errors import HocketError
from ...compiler.program import Decision, Program, copy_program, note
from ..remembered import Remembered
from ..tiles.fuse import WAIT, exposed_seconds, least_seconds
from ..tiles.regions import collective_of
from ..timeline import KINDS
from .gathered_factors import Held, find_gathered_factors
from .partial_product import find_partial_product
from .trade import NAME, Site, Trade


@dataclass(frozen=True)
class Swaps:
    """The waits of the collectives that are swapped, in order, and a decision for every collective."""

    waits: tuple[str, ...]
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class SwapProducts:
    """Gather factors or add up products, whichever is predicted to be quicker.

    least_gain: predicted part of the time of product and collective that a swap must save, besides twice what such predictions are
    off (``TileCosts.doubt``); negative to swap whatever can be swapped.
    """

    name: ClassVar[str] = NAME
    contract: ClassVar[Contract] = Equal()
    least_gain: float = 0.03
    known: Remembered[Swaps] = field(default_factory=Remembered, compare=False, repr=False)

    def __call__(self, program: Program, context: Context) -> Program:
        """The program with its swaps, and a decision for every collective: swapped, or kept and why."""
        if program.mesh is None:
            return program.decided(Decision(NAME, "", applied=False, reason="the program is not lowered to a mesh"))
        chosen = self.known.choose(program, lambda: self._search(copy_program(program)[0], context))
        new, _ = copy_program(program)
        held = Held(new)
        for name in chosen.waits:
            wait = next(node for node in new.nodes if node.name == name)
            found = _find(new, wait, context, {}, held)
            if isinstance(found, str):
                raise HocketError(
                    f"the swap of {collective_of(wait).name} cannot be made at these sizes: {found} "
                    f"(from {note(wait).source or 'an unknown line'}); leave swaps out with OverlapTiles(swaps=False)"
                )
            found.make()
        return new.decided(*chosen.decisions)

    def _search(self, program: Program, context: Context) -> Swaps:
        """Look at every collective in order, swapping on the way: a factor that is gathered once serves several products."""
        exposed = exposed_seconds(program, context)
        held = Held(program)
        swapped: list[str] = []
        decisions: list[Decision] = []
        for name in [node.name for node in program.nodes if node.target is WAIT]:
            wait = next((node for node in program.nodes if node.name == name), None)
            if wait is None:
                continue  # gone with the swap of another collective
            collective = collective_of(wait)
            if collective.target not in KINDS:
                continue
            decided = self._decided(_find(program, wait, context, exposed, held), collective, context)
            decisions.append(decided[0])
            if decided[1] is not None:
                swapped.append(name)
                decided[1].make()
        return Swaps(tuple(swapped), tuple(decisions))

    def _decided(self, found: Trade | str, collective: fx.Node, context: Context) -> tuple[Decision, Trade | None]:
        if isinstance(found, str):
            return Decision(NAME, collective.name, applied=False, reason=found, source=note(collective).source), None
        needed = least_seconds(self.least_gain, found.before.seconds, context.cluster.tiles)
        applied = found.gain > needed
        before, after = found.before, found.after
        reason = (
            f"{found.text}: predicted {before.seconds * 1e6:.0f} -> {after.seconds * 1e6:.0f} us, "
            f"{before.sent:.0f} -> {after.sent:.0f} bytes a rank ({context.cluster.tiles.origin}; rounding: reordered_sum)"
        )
        if not applied:
            reason = f"not worth {reason}: less than {needed * 1e6:.0f} us to gain"
        source = note(found.product).source
        return Decision(NAME, collective.name, applied, reason, found.gain, source), found if applied else None


def _find(program: Program, wait: fx.Node, context: Context, exposed: dict[str, float], held: Held) -> Trade | str:
    """The swap that a collective allows, or why it allows none."""
    assert program.mesh is not None
    collective = collective_of(wait)
    axis = str(collective.args[-1])
    parts = program.mesh.axis_size(axis)
    if parts < 2:
        return "its axis has one rank"
    if len(collective.users) != 1:
        return "its result is waited for more than once"
    site = Site(axis, program.mesh.names.index(axis), parts, context.cluster, exposed)
    partial = find_partial_product(program, wait, site, context)
    if isinstance(partial, Trade):
        return partial
    factors = find_gathered_factors(program, wait, site, context, held)
    return factors if isinstance(factors, Trade) or partial == "it gathers nothing" else partial
