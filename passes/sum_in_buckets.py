"""Sum the gradients of a stage over replicas in a few large collectives instead of one for each parameter.

    all_reduce(a), all_reduce(b), ..    ==    split(all_reduce([a, b, ..]))

A collective costs a latency and its bytes; gradients that are laid end to end pay the latency once, and a copy in and out. One
whose copy would take longer than the latency it saves stays alone. Sums are elementwise, so the values are the same; the bits too,
where the network adds ranks in an order that does not depend on the place of an element (two replicas, or hocket's shared memory).
Buckets, as in DistributedDataParallel (Li et al., VLDB 2020), but of whatever a stage sums once a step.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch.distributed.tensor import Shard

from ..compiler.contract import Context, Contract, Equal
from ..compiler.program import Decision, Phase, Program, RoleKind, annotate, copy_program, note, tensor_leaves
from ..compiler.redistribute import StepKind
from .backward_split_costs import Costs, stored_bytes

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Sum:
    """A sum over ranks that runs once a step. name: of the gradient it belongs to."""

    reduce: fx.Node
    wait: fx.Node
    name: str

    @property
    def share(self) -> fx.Node:
        """What this rank adds."""
        source = self.reduce.args[0]
        assert isinstance(source, fx.Node), "a collective takes a tensor"
        return source

    @property
    def bytes(self) -> int:
        """Of the share."""
        return stored_bytes(self.share)


@dataclass(frozen=True)
class SumInBuckets:
    """Join the sums of each stage. stage_of: parameter -> the stage that updates it or hands out its gradient."""

    name: ClassVar[str] = "sum-in-buckets"
    contract: ClassVar[Contract] = Equal()
    stage_of: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __call__(self, program: Program, context: Context) -> Program:
        """The program with joined sums, and a Decision for every sum of the optimizer's phase."""
        new, _ = copy_program(program)
        buckets: dict[tuple[Any, ...], list[Sum]] = {}
        decisions = []
        for one in _sums(new):
            reason = self._refusal(one, context)
            if reason:
                decisions.append(self._decision(one, reason, applied=False))
                continue
            key = (self.stage_of.get(one.name), *one.reduce.args[1:], one.share.meta["val"].dtype)
            buckets.setdefault(key, []).append(one)
        for bucket in buckets.values():
            if len(bucket) == 1:
                decisions.append(self._decision(bucket[0], "the only one of its kind at its stage", applied=False))
                continue
            total = sum(one.bytes for one in bucket)
            where = self.stage_of.get(bucket[0].name, 0)
            reason = f"one of {len(bucket)} gradients of stage {where} that are summed as one, {total:,} bytes"
            gain = _latency(context) * (len(bucket) - 1) / len(bucket)
            decisions += [self._decision(one, reason, applied=True, gain=gain - _copy(one, context)) for one in bucket]
            _join(bucket, self.name)
        return new.decided(*decisions)

    def _refusal(self, one: Sum, context: Context) -> str:
        if one.name not in self.stage_of:
            return "no gradient of a single stage"
        layouts = note(one.share).layouts
        if layouts is None or layouts[0] is None or any(isinstance(placement, Shard) for placement in layouts[0]):
            return "a piece of a parameter that is cut: stays alone"
        copied, saved = _copy(one, context), _latency(context)
        if copied > saved:
            return f"copying {one.bytes:,} bytes would take {copied * 1e6:.0f} us, a collective {saved * 1e6:.0f} us: stays alone"
        return ""

    def _decision(self, one: Sum, reason: str, *, applied: bool, gain: float | None = None) -> Decision:
        return Decision(
            self.name,
            one.reduce.name,
            applied=applied,
            reason=f"sum of {one.name}: {reason}",
            gain=gain,
            source=note(one.share).source,
        )


def _sums(program: Program) -> list[Sum]:
    """The all-reduces that run once a step, with the gradient whose way leads through them."""
    gradients = {
        role.name: node
        for role, node in zip(program.signature.outputs, program.results, strict=True)
        if role.kind is RoleKind.GRADIENT and node is not None
    }
    found: dict[fx.Node, Sum] = {}
    for name, node in gradients.items():
        at = node
        while at.op == "call_function" and note(at).phase is Phase.OPTIMIZER and len(at.all_input_nodes) == 1:
            source = at.all_input_nodes[0]
            if at.target is c10d.wait_tensor.default and source.target is c10d.all_reduce.default and len(source.users) == 1:
                found.setdefault(source, Sum(source, at, name))
                break
            at = source
    return [found[node] for node in program.nodes if node in found]


def _latency(context: Context) -> float:
    """Seconds of a collective of no bytes."""
    return max(line.alpha for line in (context.cluster.line(StepKind.ALL_REDUCE, axis) for axis in context.mesh.names))


def _copy(one: Sum, context: Context) -> float:
    return 2 * one.bytes * Costs(context.cluster).seconds_per_byte()


def _join(bucket: list[Sum], by: str) -> None:
    """Replace the sums of a bucket by one, before the last of them; what reads an earlier one moves behind it."""
    last = bucket[-1].reduce
    graph = last.graph
    like = note(bucket[-1].reduce)

    def made(target: Any, args: tuple[Any, ...], shape_like: fx.Node | None = None) -> fx.Node:
        node = graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda arg: arg.meta["val"])
        node.meta["val"] = target(*values) if target not in (c10d.all_reduce.default, c10d.wait_tensor.default) else values[0]
        layouts = like.layouts if shape_like is None else note(shape_like).layouts
        results = tensor_leaves(node.meta["val"])
        shapes = tuple(tuple(int(size) for size in value.shape) for value in results)
        of_all = None if layouts is None else layouts * len(results)
        annotate(
            node, source=like.source, module=like.module, phase=Phase.OPTIMIZER, layouts=of_all, global_shapes=shapes, added_by=by
        )
        return node

    with graph.inserting_before(last):
        rows, forms = [], []
        for one in bucket:
            value = one.share.meta["val"]
            dims = sorted(range(value.dim()), key=lambda dim: (-value.stride(dim), -value.shape[dim], dim))
            moved = one.share if dims == list(range(value.dim())) else made(aten.permute.default, (one.share, dims), one.share)
            forms.append((dims, tuple(int(size) for size in moved.meta["val"].shape)))
            rows.append(made(aten.view.default, (moved, [value.numel()]), one.share))
        flat = made(aten.cat.default, (rows,), bucket[0].share)
        total = made(c10d.wait_tensor.default, (made(c10d.all_reduce.default, (flat, *last.args[1:])),), bucket[-1].wait)
        parts = made(aten.split_with_sizes.default, (total, [int(row.meta["val"].numel()) for row in rows]), bucket[-1].wait)
        for number, (one, (dims, shape)) in enumerate(zip(bucket, forms, strict=True)):
            piece = made(operator.getitem, (parts, number), one.wait)
            back = made(aten.view.default, (piece, list(shape)), one.wait)
            if dims != list(range(len(dims))):
                inverse = sorted(range(len(dims)), key=dims.__getitem__)
                back = made(aten.permute.default, (back, inverse), one.wait)
            annotate(back, carries=note(one.wait).carries, origin=note(one.wait).origin)
            one.wait.replace_all_uses_with(back)
    for one in bucket:
        graph.erase_node(one.wait)
        graph.erase_node(one.reduce)
    _put_readers_behind(graph)


def _put_readers_behind(graph: fx.Graph) -> None:
    """Restore an order in which every node comes after what it reads, otherwise the one there is."""
    done: set[fx.Node] = set()
    waiting: list[fx.Node] = []
    place = graph._root
    for node in list(graph.nodes):
        waiting.append(node)
        moved = True
        while moved:
            moved = False
            for one in waiting:
                if all(source in done for source in one.all_input_nodes):
                    waiting.remove(one)
                    done.add(one)
                    place.append(one)
                    place = one
                    moved = True
                    break
