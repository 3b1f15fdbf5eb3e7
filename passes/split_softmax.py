"""Write log-softmax and the loss on it as sums over the classes, so that classes can be cut (Megatron-LM, arXiv 1909.08053, 3).

    e = exp(x - m),  z = sum_v e[v],  m = max_v x[v]        log softmax(x)  =  x - m - log z,      softmax(x)  =  e / z
    y[t]                    =    sum_p  (t lies in piece p  ?  y_p[t - p V/P]  :  0)               or sum_v (v == t ? y[v] : 0)
    d log softmax: dx       =    g - e / z sum_v g[v]
    d nll: dy[v]            =    v == t and t counts  ?  -w[t] g / n  :  0
    both together: dx[v]    =    (v == t ? c : 0) - e[v] c / z,    c = t counts ? -w[t] g / n : 0

As fused kernels these ops need all classes of a token on one rank: a head cut over its vocabulary would have to gather the logits,
which are the largest values of a language model. Written out, a maximum, a sum and the target's entry of each token go over the
wire; every op has its ordinary rule, and what is not cut costs more passes over the logits than the fused kernels make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from ..compiler.contract import Context, Contract, Equal
from ..compiler.program import Decision, Program, annotate, copy_program, note
from .chain.batch import Inserter
from .pieces_of_rows import places_in_pieces

aten = torch.ops.aten

_MEAN = 1
_NLL_BACKWARD = (aten.nll_loss_backward.default, aten.nll_loss2d_backward.default)
_BACKWARD = aten._log_softmax_backward_data.default


@dataclass(frozen=True)
class SplitSoftmax:
    """Write out every log-softmax over ``least`` classes or more, its backward, and the choice of the target's entry.

    axis: a mesh axis; where it divides the classes, the entry is looked for in as many pieces as it has ranks, elsewhere in a mask
    over all classes. Half-precision logits are worked on in float32, as the fused kernels do.
    """

    axis: str = ""
    least: int = 2
    name: ClassVar[str] = "split-softmax"
    contract: ClassVar[Contract] = Equal()

    def __call__(self, program: Program, context: Context) -> Program:
        """The program with a Decision for each log-softmax. InputError when the mesh has no such axis."""
        parts = context.mesh.axis_size(self.axis) if self.axis else 1
        new, _ = copy_program(program)
        decisions = [self._decide(node, parts) for node in list(new.nodes) if node.target is aten._log_softmax.default]
        new.graph.graph.eliminate_dead_code()
        return new.decided(*decisions)

    def _decide(self, node: fx.Node, parts: int) -> Decision:
        value = node.meta["val"]
        classes = value.shape[node.args[1]] if value.dim() else 1
        readers = _readers(node)
        reason = f"{classes} classes, fewer than {self.least}" if classes < self.least else _hindrance(node, readers)
        applied = not reason
        if applied:
            named = {1: "one op that reads it"}.get(len(readers), f"{len(readers)} ops that read it")
            _Written(node, parts).replace(readers)
            reason = f"log-softmax over {classes} classes and {named} are sums over the classes now: they may be cut"
        return Decision(self.name, node.name, applied=applied, reason=reason, source=note(node).source)


def _readers(softmax: fx.Node) -> list[fx.Node]:
    """What is written out together with a log-softmax: gradients, and choices of entries."""
    kinds = (_BACKWARD, aten.gather.default, *_NLL_BACKWARD)
    weighted = [user for user in softmax.users if user.target is aten.mul.Tensor]
    found = {user: None for one in (softmax, *weighted) for user in one.users if user.target in kinds}
    choices = {(node.args[1], node.args[2]) for node in found if node.target is aten.gather.default}
    for _, index in choices:  # the weights of the targets, chosen by the same index
        assert isinstance(index, fx.Node)
        found |= {
            user: None for user in index.users if user.target is aten.gather.default and (user.args[1], user.args[2]) in choices
        }
    return sorted(found, key=lambda node: kinds.index(node.target))  # a gradient together with the one that it is of, if it can be


def _hindrance(softmax: fx.Node, readers: list[fx.Node]) -> str:
    rank, dim = softmax.meta["val"].dim(), softmax.args[1]
    for node in readers:
        if node.target is aten.gather.default:
            index: Any = node.args[2]
            if (node.args[1] - dim) % rank or index.meta["val"].shape[dim] != 1:  # type: ignore[operator]
                return f"{node.name} chooses more than one entry a row, or along another dimension"
    return ""


class _Written:
    """One log-softmax, written out."""

    def __init__(self, softmax: fx.Node, parts: int) -> None:
        logits: Any = softmax.args[0]
        self.softmax, self.parts = softmax, parts
        self.rank = softmax.meta["val"].dim()
        self.dim = softmax.args[1] % self.rank
        call = self._inserter(softmax).call
        x = _in_dtype(call, logits, _accumulated(logits))
        self.shifted = call(aten.sub.Tensor, x, call(aten.amax.default, x, [self.dim], keepdim=True))
        self.exps = call(aten.exp.default, self.shifted)
        self.total = call(aten.sum.dim_IntList, self.exps, [self.dim], keepdim=True)
        self.log_total = call(aten.log.default, self.total)

    def replace(self, readers: list[fx.Node]) -> None:
        """Replace the log-softmax and its readers."""
        for node in readers:
            insert = self._inserter(node)
            if node.target is _BACKWARD:
                written = self._backward(insert, node)
            elif node.target is aten.gather.default:
                written = self._choice(insert, node)
            else:
                written = self._loss_backward(insert, node)
            self._put(written, node)
            node.graph.erase_node(node)
        if self.softmax.users:
            call = self._inserter(self.softmax).call
            whole = call(aten.sub.Tensor, self.shifted, self.log_total)
            self._put(_in_dtype(call, whole, self.softmax.meta["val"].dtype), self.softmax)

    def _put(self, written: fx.Node, node: fx.Node) -> None:
        """Use what is written out, and say whose value it has: so it can be proven by itself."""
        annotate(written, carries=node.name)
        node.replace_all_uses_with(written)

    def _inserter(self, anchor: fx.Node) -> Inserter:
        return Inserter(anchor.graph, anchor, SplitSoftmax.name)

    def _choice(self, insert: Inserter, node: fx.Node) -> fx.Node:
        values: Any = node.args[0]
        if values is not self.softmax:
            return self._entry(insert, values, node.args[2])
        entry = insert.call(aten.sub.Tensor, self._entry(insert, self.shifted, node.args[2]), self.log_total)
        return _in_dtype(insert.call, entry, node.meta["val"].dtype)

    def _entry(self, insert: Inserter, values: fx.Node, target: Any) -> fx.Node:
        """values[target] along the classes, where the target has size 1."""
        call, shape = insert.call, list(values.meta["val"].shape)
        classes = shape[self.dim]
        if self.parts == 1 or classes % self.parts:
            own = call(aten.where.self, self._is_target(insert, values, target), values, _zero(call, values))
            return call(aten.sum.dim_IntList, own, [self.dim], keepdim=True)
        held, place = places_in_pieces(insert, call(aten.unsqueeze.default, target, self.dim), self.dim, classes, self.parts)
        apart = call(aten.view.default, values, [*shape[: self.dim], self.parts, classes // self.parts, *shape[self.dim + 1 :]])
        found = call(aten.gather.default, apart, self.dim + 1, place)
        return call(aten.sum.dim_IntList, call(aten.where.self, held, found, _zero(call, values)), [self.dim])

    def _backward(self, insert: Inserter, node: fx.Node) -> fx.Node:
        gradient: Any = node.args[0]
        call, dtype = insert.call, node.args[3]
        if gradient.target in _NLL_BACKWARD and gradient.args[1] is self.softmax:
            each, target = self._each(insert, gradient, self.exps.meta["val"].dtype)
            own = call(aten.where.self, self._is_target(insert, self.exps, target), each, _zero(call, self.exps))
            scale = call(aten.div.Tensor, call(aten.neg.default, each), self.total)
            return _in_dtype(call, call(aten.addcmul.default, own, self.exps, scale), dtype)
        g = _in_dtype(call, gradient, _accumulated(gradient))
        total = call(aten.div.Tensor, call(aten.sum.dim_IntList, g, [self.dim], keepdim=True), self.total)
        return _in_dtype(call, call(aten.sub.Tensor, g, call(aten.mul.Tensor, self.exps, total)), dtype)

    def _loss_backward(self, insert: Inserter, node: fx.Node) -> fx.Node:
        values: Any = node.args[1]
        each, target = self._each(insert, node, node.meta["val"].dtype)
        return insert.call(aten.where.self, self._is_target(insert, values, target), each, _zero(insert.call, node))

    def _each(self, insert: Inserter, node: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
        """(gradient of the target's entry, 0 where it does not count; the target), both of size 1 along the classes."""
        gradient, _, target, weight, reduction, ignored, total = node.args
        call = insert.call
        assert isinstance(gradient, fx.Node)
        wide = call(aten.unsqueeze.default, target, self.dim)
        counts = call(aten.ne.Scalar, wide, ignored)
        g = call(aten.div.Tensor, gradient, total) if reduction == _MEAN else gradient
        g = call(aten.unsqueeze.default, g, self.dim) if g.meta["val"].dim() else g
        if weight is not None:
            zeros = call(aten.scalar_tensor.default, 0, dtype=torch.int64, device=wide.meta["val"].device)
            safe = call(aten.where.self, counts, wide, zeros)
            g = call(aten.mul.Tensor, g, call(aten.index.Tensor, weight, [safe]))
        g = _in_dtype(call, call(aten.neg.default, g), dtype)
        return call(aten.where.self, counts, g, _zero(call, g)), wide

    def _is_target(self, insert: Inserter, values: fx.Node, target: fx.Node) -> fx.Node:
        """Where the class is the target."""
        known = values.meta["val"]
        classes = insert.call(aten.arange.default, known.shape[self.dim], dtype=torch.int64, device=known.device, pin_memory=False)
        along = insert.call(aten.view.default, classes, [-1 if dim == self.dim else 1 for dim in range(self.rank)])
        return insert.call(aten.eq.Tensor, along, target)


def _zero(call: Any, like: fx.Node) -> fx.Node:
    known = like.meta["val"]
    zero: fx.Node = call(aten.scalar_tensor.default, 0, dtype=known.dtype, device=known.device)
    return zero


def _accumulated(node: fx.Node) -> torch.dtype:
    """What the fused kernels compute in."""
    dtype: torch.dtype = node.meta["val"].dtype
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _in_dtype(call: Any, node: fx.Node, dtype: Any) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else call(aten._to_copy.default, node, dtype=dtype)
