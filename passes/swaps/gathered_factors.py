"""Gather the factors of a product instead of adding up their products (sufficient factors: Xie et al., UAI 2016, arXiv 1511.02910).

    all_reduce(x_r @ y_r)      =  all_gather_k(x) @ all_gather_k(y)
    reduce_scatter(x_r @ y_r)  =  own rows of the same

where rank r holds piece r of the contracted dimension k of both. The gradient of a weight is such a product, k being the rows of
the batch: with few rows the factors are far smaller than the gradient (Poseidon, arXiv 1706.03292, chooses between the two for
every layer, as is done here). Instead of 2 (p-1)/p of the result each rank sends its factors to p-1 others; it multiplies p times
as much for an all-reduce, and no more for a reduce-scatter, of which it makes its own rows only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from ...compiler.contract import Context
from ...compiler.layout import Layout, Partial, Replicate, Shard
from ...compiler.program import Program, annotate, note, tensor_inputs
from ...compiler.redistribute import Step, StepKind
from ...compiler.rules.views import RESHAPES
from ...compiler.tiles import Cut
from ..collectives import emit_step
from ..tiles.cuts import Cuts, Order
from ..tiles.predict import message_seconds
from ..tiles.regions import collective_of
from .own_chunk import MOVES, OwnChunks, describe, erase_unused, place, template_of, unused
from .trade import NAME, Bill, Site, Trade, factor_shapes, is_cut_elsewhere, nbytes_of, placement_of, product_seconds

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

CONTRACTED: dict[Any, tuple[int, int]] = {aten.mm.default: (1, 0), aten.bmm.default: (2, 1)}
"""Products, with the contracted dimension of either factor."""

SENT: dict[Any, str] = {c10d.all_reduce.default: "all_reduce", c10d.reduce_scatter_tensor.default: "reduce_scatter"}

_TURNS = frozenset({*RESHAPES, aten.t.default, aten.transpose.int, aten.permute.default})


@dataclass(frozen=True)
class Factor:
    """A factor of a product. source: what is gathered; views: the ops that make the factor of it; dim: that the ranks cut in it."""

    source: fx.Node
    views: tuple[fx.Node, ...]
    dim: int

    @property
    def nbytes(self) -> int:
        """Of the piece of a rank."""
        return nbytes_of(self.source.meta["val"])


class Held:
    """What ranks hold whole. gathered: by what was gathered, and the axis; holders: nodes by the logical value that they carry."""

    def __init__(self, program: Program) -> None:
        self.gathered: dict[tuple[fx.Node, int], fx.Node] = {}
        self.holders: dict[str, list[fx.Node]] = {}
        for node in program.nodes:
            if note(node).carries:
                self.holders.setdefault(note(node).carries, []).append(node)

    def whole(self, source: fx.Node, site: Site, reader: fx.Node) -> fx.Node | None:
        """A value of the same segment, there before ``reader``, that holds all of what would be gathered: because it was gathered
        for another product, or is sliced."""
        known = self.gathered.get((source, site.number))
        if known is not None and known < reader:
            return known
        (layout,) = note(source).layouts or (None,)
        if layout is None:
            return None
        wanted = (*layout[: site.number], Replicate(), *layout[site.number + 1 :])
        for node in self.holders.get(note(source).carries, ()):
            here = node.op == "placeholder" or note(node).phase is note(source).phase
            if here and note(node).layouts == (wanted,) and not node._erased and node < reader:
                return node
        return None


def find_gathered_factors(program: Program, wait: fx.Node, site: Site, context: Context, held: Held) -> Trade | str:
    """The swap at a sum over ranks, or why there is none."""
    collective = collective_of(wait)
    if collective.target not in SENT:
        return "it adds nothing up"
    if collective.args[1] != "sum":
        return f"a reduction by {collective.args[1]} is no sum of products"
    root = product = tensor_inputs(collective)[0]
    while product.target in MOVES and len(product.all_input_nodes) == 1 and len(product.users) == 1:
        product = product.all_input_nodes[0]
    if product.target not in CONTRACTED:
        return "what it adds up is no product"
    if len(product.users) != 1 or len(root.users) != 1 or len(collective.users) != 1:
        return f"{product.name} is also read before it is added up"
    if placement_of(product, site.number) != Partial("sum"):
        return f"no pass has said that the ranks add up {product.name}"
    pair = [_factor(node, dim, site) for node, dim in zip(tensor_inputs(product), CONTRACTED[product.target], strict=True)]
    factors = [one for one in pair if isinstance(one, Factor)]
    if len(factors) < 2:
        return next(one for one in pair if isinstance(one, str))
    scatters = collective.target is c10d.reduce_scatter_tensor.default
    rows = Cut(0, 1, root.meta["val"].shape[0] // site.parts) if scatters and root.meta["val"].dim() else None
    if scatters and (rows is None or root.meta["val"].shape[0] % site.parts):
        return f"its operand does not have {site.parts} equal chunks of rows"
    before, after = _bills(collective, product, factors, site, held)
    text = f"the factors of {product.name} gathered, {'its own rows' if scatters else 'all of it'} made on every rank"
    cuts = Cuts(context.rules, site.parts, Order(program.graph.graph))
    swap = _Swap(program, wait, root, product, site, cuts)
    return Trade(before, after, text, product, lambda: swap.make(factors, rows, held))


def _factor(node: fx.Node, dim: int, site: Site) -> Factor | str:
    """What to gather for a factor: itself, or better what it is a view of where that is cut along its first dimension, since pieces
    of another one must be put in order after they have arrived."""
    if placement_of(node, site.number) != Shard(dim) or is_cut_elsewhere(node, site.number, dim):
        return f"the ranks do not hold equal rows of {node.name}, which is summed over dimension {dim}"
    found, views = Factor(node, (), dim), list[fx.Node]()
    while found.dim and node.target in _TURNS and len(node.all_input_nodes) == 1:
        views.insert(0, node)
        node = node.all_input_nodes[0]
        held = placement_of(node, site.number)
        if not isinstance(held, Shard) or is_cut_elsewhere(node, site.number, held.dim):
            break
        if held.dim == 0:
            return Factor(node, tuple(views), 0)
    return found


def _bills(collective: fx.Node, product: fx.Node, factors: list[Factor], site: Site, held: Held) -> tuple[Bill, Bill]:
    """What the sum takes as it stands, and with its factors gathered."""
    parts, cluster, kind = site.parts, site.cluster, SENT[collective.target]
    nbytes, made = nbytes_of(tensor_inputs(collective)[0].meta["val"]), list(product.meta["val"].shape)
    share = (2 if kind == "all_reduce" else 1) * (parts - 1) / parts
    before = site.left(collective, Bill(message_seconds(kind, nbytes, parts, site.axis, cluster), share * nbytes))
    shapes = factor_shapes(product)
    before += Bill(product_seconds(product, cluster, shapes, made))
    for shape, dim in zip(shapes, CONTRACTED[product.target], strict=True):
        shape[dim] *= parts
    done = product_seconds(product, cluster, shapes, made)
    if kind == "reduce_scatter":
        done /= parts
    after = Bill(done)
    for factor in dict.fromkeys(factors):
        if held.whole(factor.source, site, product) is not None:
            continue
        seconds = message_seconds("gather", factor.nbytes, parts, site.axis, cluster)
        if factor.dim:
            seconds += 2 * parts * factor.nbytes / cluster.memory_bandwidth
        after += Bill(seconds, (parts - 1.0) * factor.nbytes)
    return before, after


class _Swap:
    """Rewrites one sum."""

    def __init__(self, program: Program, wait: fx.Node, root: fx.Node, product: fx.Node, site: Site, cuts: Cuts) -> None:
        self.graph, self.wait, self.root, self.product, self.site = program.graph.graph, wait, root, product, site
        assert program.mesh is not None
        self.own = OwnChunks(self.graph, program.mesh, site.axis, cuts)
        self.own.local.template = template_of(product, NAME)

    def make(self, factors: list[Factor], rows: Cut | None, held: Held) -> None:
        """Gather, multiply, and put the result in place of the sum; of a scattered one the rank's own rows."""
        dead, number, product = unused(self.graph), self.site.number, self.product
        with self.graph.inserting_before(product):
            whole = [self._whole(factor, held) for factor in factors]
            made = self.own.repeat(product, whole, product.meta["val"].shape)
        assert made is not None  # the sizes of a product follow from its factors
        describe(made, product, number, Replicate())
        product.replace_all_uses_with(made)
        node = root = made if self.root is product else self.root
        while node is not made:
            if note(node).layouts:
                describe(node, node, number, Replicate())
            node = node.all_input_nodes[0]
        if rows is not None:
            self.own.through = frozenset({made})
            with self.graph.inserting_before(self.wait):
                result = self.own.local.contiguous(self.own.own(root, rows))
            result.meta["hocket"] = note(self.wait)
        else:
            result = root
            if note(self.wait).layouts:
                annotate(result, layouts=note(self.wait).layouts, global_shapes=note(self.wait).global_shapes,
                         carries=note(self.wait).carries)  # fmt: skip
        self.wait.replace_all_uses_with(result)
        erase_unused(self.graph, dead)

    def _whole(self, factor: Factor, held: Held) -> fx.Node:
        """A factor of which every rank holds everything."""
        local, number = self.own.local, self.site.number
        source = factor.source
        value = held.whole(source, self.site, self.product)
        if value is None:
            (layout,), (shape,) = note(source).layouts or (None,), note(source).global_shapes or (None,)
            assert layout is not None
            assert shape is not None
            after = (*layout[:number], Replicate(), *layout[number + 1 :])
            step = Step(StepKind.ALL_GATHER, number, layout, after)
            value = emit_step(local, step, source, shape, f"{source.name}_all_gather_{self.site.axis}")
            place(value, source, number, Replicate())
            held.gathered[source, number] = value
        for view in factor.views:
            (shape,) = note(view).global_shapes or (None,)
            assert shape is not None
            made = self.own.repeat(view, [value], [*_sizes(self.own, shape, view, number)])
            assert made is not None  # the layouts on either side of a view hold on every number of ranks
            place(made, view, number, Replicate())
            value = made
        return value


def _sizes(own: OwnChunks, shape: tuple[int, ...], view: fx.Node, number: int) -> list[int]:
    """Sizes of a view's value on a rank, once it is whole along the axis."""
    (layout,) = note(view).layouts or (None,)
    assert layout is not None
    held: Layout = (*layout[:number], Replicate(), *layout[number + 1 :])
    return [size if isinstance(size, int) else int(size.meta["val"]) for size in own.local.sizes(shape, held)]
