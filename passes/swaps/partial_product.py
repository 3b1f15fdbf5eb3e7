"""Multiply what a rank has, and add up the results, instead of gathering what is multiplied.

    all_gather_k(x) @ w   =  sum over ranks r of  x_r @ w[chunk r]  =  all_reduce(x_r @ own(w))
    f(all_gather_k(x)) @ g(w)   likewise, for f and g that act on the entries of k one by one

for a w that all ranks hold whole (or gather along the same axis: then that gather is dropped too). Every rank multiplies 1/p of the
contracted dimension instead of all of it. Whether it sends less depends on the sizes: p-1 pieces of x, or 2 (p-1)/p of the result.
torch does it for Gram matrices (``torch._inductor.fx_passes.decomp_comms``); here any region between gather and product is swapped
that the rules let the cut through, and any number of products that read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.fx as fx

from ...compiler.contract import Context
from ...compiler.layout import Partial, Replicate
from ...compiler.program import Program, annotate, note, tensor_inputs
from ...compiler.redistribute import Step, StepKind
from ...compiler.tiles import Cut
from ..collectives import emit_step
from ..tiles.cuts import HEAVY, Cuts, Order, Passage
from ..tiles.predict import message_seconds, region_seconds
from ..tiles.regions import Region, collective_of, grow_ahead
from .own_chunk import OwnChunks, describe, erase_unused, template_of, unused
from .trade import NAME, Bill, Site, Trade, nbytes_of, placement_of

aten, c10d = torch.ops.aten, torch.ops._c10d_functional


class ContractedCuts(Cuts):
    """Cuts that also know that ``c + a @ b`` is a sum over the contracted dimension, to which c is added once."""

    def forward(self, node: fx.Node, given: Sequence[Cut | None]) -> Passage | None:
        """See ``Cuts``."""
        found = super().forward(node, given)
        if found is not None or node.target is not aten.addmm.default or node.kwargs:
            return found
        wanted = next(((c.outer, c.inner) for c in given if c is not None), (1, 1))
        inputs = (None, Cut(1, *wanted), Cut(0, *wanted))
        fits = all(have is None or have == want for have, want in zip(given, inputs, strict=True))
        return Passage(inputs, (None,), sums=True) if fits else None


def find_partial_product(program: Program, wait: fx.Node, site: Site, context: Context) -> Trade | str:
    """The swap at a gather, or why there is none."""
    graph = program.graph.graph
    gather = collective_of(wait)
    if gather.target is not c10d.all_gather_into_tensor.default:
        return "it gathers nothing"
    length = wait.meta["val"].shape[0]
    cuts = ContractedCuts(context.rules, site.parts, Order(graph))
    region = _sums_of(grow_ahead(wait, cuts, length // site.parts))
    if not any(node.target in HEAVY for node in region.sums):
        return "no product contracts the dimension that it gathers"
    reason = _obstacle(region, site)
    if reason:
        return reason
    own = OwnChunks(graph, program.mesh, site.axis, cuts)  # type: ignore[arg-type]  # lowered
    swap = _Swap(graph, region, site, own)
    before = site.left(gather, _gather_bill(gather, site)) + Bill(region_seconds(region, site.parts, site.cluster))
    for other in swap.gathers_dropped():
        before += site.left(other, _gather_bill(other, site))
    after = Bill(region_seconds(region, 1, site.cluster))
    for node in region.sums:
        nbytes = nbytes_of(node.meta["val"])
        seconds = message_seconds("all_reduce", nbytes, site.parts, site.axis, site.cluster)
        after += Bill(seconds, 2 * (site.parts - 1) / site.parts * nbytes)
    product = next(node for node in region.members if node.target in HEAVY)
    count = len(region.sums)
    text = f"{count} product{'s' * (count > 1)} of what each rank has of {gather.name}, added up, instead of gathering it"
    return Trade(before, after, text, product, swap.make)


def _gather_bill(gather: fx.Node, site: Site) -> Bill:
    nbytes = nbytes_of(tensor_inputs(gather)[0].meta["val"])
    return Bill(message_seconds("gather", nbytes, site.parts, site.axis, site.cluster), (site.parts - 1.0) * nbytes)


def _sums_of(region: Region) -> Region:
    """Of a region, the members that add up and what they are made of."""
    needed = set(region.sums)
    for node in reversed(list(region.members)):
        if node in needed:
            needed.update(node.all_input_nodes)
    region.members = {node: passage for node, passage in region.members.items() if node in needed}
    return region


def _obstacle(region: Region, site: Site) -> str:
    """Why the sums of a region cannot be made rank by rank."""
    assert region.ahead is not None
    kept = [region.ahead, *(node for node in region.members if node not in region.sums)]
    for value in kept:
        others = [user.name for user in value.users if user not in region.members]
        if others:
            return f"what it gathers is needed whole by {others[0]}"
    for node, passage in region.members.items():
        if len(passage.outputs) > 1:
            return f"{node.name} makes several values"
        if node in region.sums and placement_of(node, site.number) != Replicate():
            return f"{node.name} differs from rank to rank"
        for source in tensor_inputs(node):
            if source is region.ahead or source in region.members:
                continue
            if placement_of(source, site.number) != Replicate():
                return f"{node.name} also reads {source.name}, which differs from rank to rank"
    return ""


class _Swap:
    """Rewrites one region."""

    def __init__(self, graph: fx.Graph, region: Region, site: Site, own: OwnChunks) -> None:
        self.graph, self.region, self.site, self.own = graph, region, site, own

    def gathers_dropped(self) -> list[fx.Node]:
        """Gathers of other operands along the same axis, of which a rank needs its own piece only."""
        found = []
        for node, passage in self.region.members.items():
            for source, cut in zip(tensor_inputs(node), passage.inputs, strict=True):
                if cut is not None and source is not self.region.ahead and source not in self.region.members:
                    found += list(self._gathers_behind(source, cut))
        return list(dict.fromkeys(found))

    def _gathers_behind(self, node: fx.Node, cut: Cut) -> Iterator[fx.Node]:
        while len(node.users) == 1 and len(node.all_input_nodes) == 1:
            if node.target is c10d.wait_tensor.default:
                if self.own.is_gathered_so(node, cut):
                    yield collective_of(node)
                return
            passage = self.own.cuts.backward(node, 0, cut) if self.own.moves(node) else None
            if passage is None or passage.inputs[0] is None:
                return
            node, cut = node.all_input_nodes[0], passage.inputs[0]

    def make(self) -> None:
        """Own chunks of every member, sums over ranks in place of the members that add up."""
        dead, local = unused(self.graph), self.own.local
        assert self.region.ahead is not None
        self.own.own(self.region.ahead, self.region.cuts[self.region.ahead, 0])
        for node, passage in self.region.members.items():
            local.template = template_of(node, NAME)
            with self.graph.inserting_before(node):
                pairs = zip(tensor_inputs(node), passage.inputs, strict=True)
                given = [source if cut is None else self.own.own(source, cut) for source, cut in pairs]
                if passage.sums:
                    node.replace_all_uses_with(self._summed(node, given))
                else:
                    self.own.remember(node, self.region.cuts[node, 0], given)
        erase_unused(self.graph, dead)

    def _summed(self, node: fx.Node, given: Sequence[fx.Node]) -> fx.Node:
        """The sum over ranks of what a member makes of this rank's chunk."""
        local, number = self.own.local, self.site.number
        old = note(node)
        (layout,), (shape,) = old.layouts or (None,), old.global_shapes or (None,)
        assert layout is not None
        assert shape is not None
        biased = node.target is aten.addmm.default
        if biased:
            with given[1].meta["val"].fake_mode:
                val = aten.mm.default(given[1].meta["val"], given[2].meta["val"])
            partial = local.call(aten.mm.default, (given[1], given[2]), val)
        else:
            made = self.own.repeat(node, given, None)
            assert made is not None  # no shape was asked for
            partial = made
        before = (*layout[:number], Partial("sum"), *layout[number + 1 :])
        annotate(partial, layouts=(before,), global_shapes=(shape,))
        if not biased:  # the op may be any, and its result lie in any order
            partial = local.contiguous(partial)
            annotate(partial, layouts=(before,), global_shapes=(shape,))
        step = Step(StepKind.ALL_REDUCE, number, before, layout)
        total = emit_step(local, step, partial, shape, f"{node.name}_all_reduce_{self.site.axis}")
        if biased:
            annotate(total, layouts=(layout,), global_shapes=(shape,))
            total = local.call(aten.add.Tensor, (total, given[0]), total.meta["val"])
        describe(total, node, number, Replicate())
        return total
