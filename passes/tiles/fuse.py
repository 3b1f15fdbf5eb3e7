"""Fuse products with the collectives around them (T3, arXiv 2401.16677; collective matmul, Wang et al., ASPLOS 2023).

    reduce_scatter(f(x)) = for every chunk c of rows:  buffer of rank c += f(x[c])
    f(all_gather(x))     = for every chunk c of rows:  f(the operand of rank c)

for f that acts on rows one by one. The loop replaces region and collectives by one node; it is proven by writing its tiles out
(``compiler.tiles.written_out``), its steps on shared buffers are checked for races and deadlocks before it is used
(``runtime.tile_schedule``), and an executor without shared memory runs the region and the collectives as they were.

Sums over ranks are made in ring order (``reordered_sum``) and products on fewer rows (``retile``): equal in the reals, and to
rounding in floating point.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch.fx as fx

from ...compiler.contract import Context, Contract, Equal
from ...compiler.cost.cluster import TileCosts
from ...compiler.errors import HocketError
from ...compiler.program import Decision, Program, copy_program, note, tensor_inputs
from ...compiler.tiles import TileLoop, check_schedule
from ..overlap_order import OverlapOrder
from ..remembered import Remembered
from ..timeline import Timeline
from .build import Built, build, insert
from .cuts import Cuts, Order
from .predict import Prediction, predict
from .regions import (
    AHEAD,
    BEHIND,
    Region,
    c10d,
    collective_of,
    drop_side_paths,
    granularities,
    grow_ahead,
    grow_behind,
    join,
    keep_products,
)

WAIT = c10d.wait_tensor.default
REDUCTIONS = ("sum", "avg")


@dataclass(frozen=True)
class Choice:
    """One loop, by the names of nodes: the waits of its collectives, its members, which granularity of rows, and the
    number and growth of its tiles and whether ranks compute their own chunk first."""

    ahead: str
    behind: str
    members: tuple[str, ...]
    granularity: tuple[int, int]
    form: tuple[int, int, bool]
    decision: Decision


@dataclass(frozen=True)
class Chosen:
    """All loops of a program in the order in which they are put in, and the decisions about what was kept."""

    loops: tuple[Choice, ...]
    kept: tuple[Decision, ...]


@dataclass(frozen=True)
class FuseTiles:
    """Replace regions around collectives by tile loops wherever that is predicted to be quicker.

    tiles: per chunk, 0 to choose; least_gain: predicted part of a region's time that a loop must save, besides twice what such
    predictions are off (``TileCosts.doubt``), negative to fuse whatever can be fused; joined: whether one loop may hold the
    collectives on both sides. What things cost is the cluster's to say.
    """

    name: ClassVar[str] = "tiles"
    contract: ClassVar[Contract] = Equal()
    tiles: int = 0
    least_gain: float = 0.03
    joined: bool = True
    known: Remembered[Chosen] = field(default_factory=Remembered, compare=False, repr=False)

    def __call__(self, program: Program, context: Context) -> Program:
        """The program with its loops, and a decision for every collective: fused, or kept and why."""
        if program.mesh is None:
            return program.decided(Decision(self.name, "", applied=False, reason="the program is not lowered to a mesh"))
        new, _ = copy_program(program)
        chosen = self.known.choose(program, lambda: _Search(self, copy_program(program)[0], context).run())
        for choice in chosen.loops:
            _apply(new, choice, context)
        return new.decided(*(choice.decision for choice in chosen.loops), *chosen.kept)


class _Search:
    """Looks at every collective of a program in order, puts loops in as it goes."""

    def __init__(self, options: FuseTiles, program: Program, context: Context) -> None:
        self.options, self.program, self.context = options, program, context
        self.loops: list[Choice] = []
        self.kept: list[Decision] = []
        self.exposed = exposed_seconds(program, context)

    def run(self) -> Chosen:
        done: set[str] = set()
        while True:
            waits = [n for n in self.program.nodes if n.target is WAIT and n.name not in done]
            if not waits:
                return Chosen(tuple(self.loops), tuple(self.kept))
            done.add(waits[0].name)
            self._look(waits[0])

    def _look(self, wait: fx.Node) -> None:
        collective = collective_of(wait)
        reason = self._obstacle(collective)
        order = Order(self.program.graph.graph)
        best: tuple[Choice, Region, Built] | None = None
        if not reason:
            for region, granularity in self._candidates(wait, order):
                if isinstance(region, str):
                    reason = reason or region
                    continue
                found = self._judge(region, granularity, order)
                if isinstance(found, str):
                    reason = reason or found
                elif best is None or _rank(found) > _rank(best):
                    best = found
        if best is None:
            reason = reason or "no product beside it takes its rows one by one"
            self.kept.append(Decision(self.options.name, collective.name, applied=False, reason=reason, source=note(wait).source))
            return
        self.loops.append(best[0])
        insert(self.program.graph.graph, best[1], best[2])

    def _obstacle(self, collective: fx.Node) -> str:
        """Why a collective can be in no loop at all."""
        mesh = self.program.mesh
        assert mesh is not None
        if collective.target not in AHEAD and collective.target not in BEHIND:
            return f"{collective.target} is none of the collectives that travel in tiles"
        if mesh.axis_size(str(collective.args[-1])) < 2:
            return "its axis has one rank"
        reduces = "reduce" in str(collective.target)
        if reduces and collective.args[1] not in REDUCTIONS:
            return f"a reduction by {collective.args[1]} is not made by adding products"
        if any(not isinstance(n, int) for n in tensor_inputs(collective)[0].meta["val"].shape):
            return "its operand has a size that depends on values"
        if collective.target is c10d.all_to_all_single.default and len({*collective.args[1], *collective.args[2]}) != 1:  # type: ignore[misc]
            return "its ranks exchange pieces of different lengths"
        if len(collective.users) != 1:
            return "its result is waited for more than once"
        return ""

    def _candidates(self, wait: fx.Node, order: Order) -> list[tuple[Region | str, tuple[int, int]]]:
        """Regions that hold this collective: joined with a later one, ahead of products, behind products."""
        collective = collective_of(wait)
        parts = self._parts(collective)
        operand = tensor_inputs(collective)[0]
        found: list[tuple[Region | str, tuple[int, int]]] = []
        if collective.target in AHEAD:
            for rows, inner in granularities(wait, parts):
                cuts = Cuts(self.context.rules, rows, order)
                if self.options.joined:
                    found += [(region, (rows, inner)) for region in self._joined(wait, cuts, inner)]
                region = grow_ahead(wait, cuts, inner)
                keep_products(region)
                if region.heavy:
                    found.append((region, (rows, inner)))
        if collective.target in BEHIND and operand.meta["val"].dim() and operand.meta["val"].shape[0] % parts == 0:
            for rows, inner in granularities(operand, parts):
                behind = grow_behind(wait, Cuts(self.context.rules, rows, order), inner)
                found.append((behind, (rows, inner)))
                if isinstance(behind, Region):
                    break
        elif collective.target in BEHIND:
            found.append((f"its operand does not have {parts} equal chunks of rows", (1, 1)))
        return found

    def _joined(self, wait: fx.Node, cuts: Cuts, inner: int) -> list[Region]:
        axis, parts = str(collective_of(wait).args[-1]), self._parts(collective_of(wait))
        for later in cuts.order.between(wait):
            if later.target is WAIT and collective_of(later).target in BEHIND and str(collective_of(later).args[-1]) == axis:
                root = tensor_inputs(collective_of(later))[0]
                length = root.meta["val"].shape[0] if root.meta["val"].dim() else 0
                if self._obstacle(collective_of(later)) or length % parts or length % cuts.rows:
                    return []
                region = join(wait, later, cuts, inner, length // cuts.rows)
                return [] if region is None else [region]
        return []

    def _judge(self, region: Region, granularity: tuple[int, int], order: Order) -> tuple[Choice, Region, Built] | str:
        """Whether a region becomes a loop: it must be closed, buildable and quicker."""
        drop_side_paths(region, order)
        if not region.heavy:
            return "its products are read, by a way around, by what they wait for"
        collective = collective_of(region.ahead or region.behind)  # type: ignore[arg-type]
        axis, parts = str(collective.args[-1]), self._parts(collective)
        if region.rows // parts < 1:
            return f"{region.rows} rows are fewer than the {parts} ranks"
        built = build(region, parts, axis)
        if isinstance(built, str):
            return built
        predicted = predict(region, built.loop, self.context.cluster, self.options.tiles, self.exposed)
        loop = built.loop = predicted.loop
        needed = least_seconds(self.options.least_gain, predicted.apart, self.context.cluster.tiles)
        if predicted.gain <= needed:
            return (
                f"predicted {predicted.apart * 1e6:.0f} us apart and {predicted.fused * 1e6:.0f} us as a loop: "
                f"less than {needed * 1e6:.0f} us to gain ({_hidden(predicted)}{self.context.cluster.tiles.origin})"
            )
        check_schedule([loop] * 3)
        decision = self._applied(region, loop, predicted)
        names = tuple(node.name for node in region.members)
        ahead, behind = (wait.name if wait is not None else "" for wait in (region.ahead, region.behind))
        return Choice(ahead, behind, names, granularity, (loop.tiles, loop.growth, loop.eager), decision), region, built

    def _applied(self, region: Region, loop: TileLoop, predicted: Prediction) -> Decision:
        waits = [wait for wait in (region.ahead, region.behind) if wait is not None]
        names = " and ".join(collective_of(wait).name for wait in waits)
        classes = ["retile"] + ["reordered_sum"] * any(r.kind in ("sum", "all_reduce", "reduce_scatter") for r in loop.results)
        reason = (
            f"{names} and {len(region.heavy)} product{'s' * (len(region.heavy) > 1)} in one loop of {loop.parts} x {loop.tiles} "
            f"{'growing ' * (loop.growth > 1)}tiles{', own chunk first' * loop.eager}, {len(loop.calls)} calls each: predicted "
            f"{predicted.apart * 1e6:.0f} -> {predicted.fused * 1e6:.0f} us "
            f"({_hidden(predicted)}{self.context.cluster.tiles.origin}; rounding: {', '.join(classes)})"
        )
        product = region.heavy[-1]
        return Decision(self.options.name, collective_of(waits[0]).name, True, reason, predicted.gain, note(product).source)  # noqa: FBT003

    def _parts(self, collective: fx.Node) -> int:
        assert self.program.mesh is not None
        return self.program.mesh.axis_size(str(collective.args[-1]))


def least_seconds(least_gain: float, apart: float, costs: TileCosts) -> float:
    """What a rewrite of something that takes ``apart`` seconds must be predicted to save: more than its part ``least_gain``, than
    twice what predictions are off, and than a busy machine's times were too long. A negative part asks for nothing."""
    if least_gain < 0:
        return least_gain * apart
    return max(least_gain * apart, 2 * costs.doubt, costs.spread * apart if costs.is_unsteady else 0.0)


def exposed_seconds(program: Program, context: Context) -> dict[str, float]:
    """By the name of a collective, the seconds of it that independent work cannot hide: that comes first, since it costs nothing.
    Empty where ranks see each other's memory: there a processor moves the bytes, and nothing travels beside its work."""
    if context.cluster.link is None:
        return {}
    ordered = OverlapOrder(least_gain=0.0)(program, context)
    calls = [node for node in ordered.nodes if node.op == "call_function"]
    return Timeline(ordered, context.cluster).run(calls).exposed


def _hidden(predicted: Prediction) -> str:
    if predicted.hidden < 1e-6:
        return ""
    return f"independent work hides {predicted.hidden * 1e6:.0f} us more; "


def _rank(found: tuple[Choice, Region, Built]) -> tuple[bool, bool, float]:
    """A loop with the collectives on both sides comes first: it stands for two loops. Then one over single rows: it can be cut into
    any number of tiles."""
    choice = found[0]
    return bool(choice.ahead and choice.behind), choice.granularity[1] == 1, choice.decision.gain or 0.0


def _apply(program: Program, choice: Choice, context: Context) -> None:
    """Put a loop that was chosen for this skeleton into a program, at its own sizes."""
    graph = program.graph.graph
    by_name = {node.name: node for node in graph.nodes}
    ahead, behind = by_name.get(choice.ahead), by_name.get(choice.behind)
    assert program.mesh is not None
    collective = collective_of(ahead or behind)  # type: ignore[arg-type]
    axis = str(collective.args[-1])
    parts = program.mesh.axis_size(axis)
    value = ahead if ahead is not None else tensor_inputs(collective)[0]
    rows, inner = granularities(value, parts)[-1 if choice.granularity[1] > 1 else 0]
    order = Order(graph)
    cuts = Cuts(context.rules, rows, order)
    region: Region | str | None
    if ahead is not None and behind is not None:
        length = tensor_inputs(collective_of(behind))[0].meta["val"].shape[0]
        region = join(ahead, behind, cuts, inner, length // rows)
    elif ahead is not None:
        region = grow_ahead(ahead, cuts, inner)
        keep_products(region)
    else:
        assert behind is not None
        region = grow_behind(behind, cuts, inner)
    if isinstance(region, Region):
        drop_side_paths(region, order)
        built = build(region, parts, axis)
        if isinstance(built, Built) and tuple(node.name for node in region.members) == choice.members:
            tiles, growth, eager = choice.form
            built.loop = dataclasses.replace(built.loop, tiles=min(tiles, rows // parts), growth=growth, eager=eager)
            insert(graph, region, built)
            return
    raise HocketError(
        f"the loop of {collective.name} cannot be made at these sizes (from {note(collective).source or 'an unknown line'}); "
        "leave OverlapTiles() out, or choose example inputs whose sizes are not so small"
    )
