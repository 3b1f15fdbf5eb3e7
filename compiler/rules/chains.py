"""Rules of chains: rows of the state are independent where the body of the step says so.

    chain(c[b], W, x[t, b]) -> (c'[b], e[t, b])        b: rows; the steps t stay whole, since each needs the one before

A chain that was cut in time (``passes.chain.segments``) has its segments among the rows, so this rule also spreads time.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...runtime.fixedpoint.body import read_body
from ...runtime.fixedpoint.op import chain_op
from ...runtime.fixedpoint.resume import resume_op
from ..layout import Replicate, Shard
from .rule import Rule
from .signature import OpSignature, TensorSpec


def is_chain(target: object) -> bool:
    """Whether a target is ``hocket::chain`` or ``hocket::resume``."""
    return getattr(target, "namespace", "") == "hocket" and target in (chain_op(), resume_op())


def chain_rules(signature: OpSignature) -> Iterator[Rule]:
    """The candidate of the module, for a body whose rows are independent."""
    if not is_chain(signature.target):
        return
    body = read_body(signature.arguments["body"])
    if not body.rows:
        return
    carries, shared = [Shard(0)] * body.carries, [Replicate()] * body.shared
    streams = [Shard(1)] * (len(signature.tensors) - body.carries - body.shared)  # and what is known, behind them
    yield Rule((*carries, *shared, *streams), (*carries, *[Shard(1)] * len(body.emits)), "hocket:chain")


def shorter(signature: OpSignature, steps: int, rows: int) -> OpSignature:
    """The same chain with fewer steps on fewer rows, its other sizes as they are: a body may name them."""
    names = list(signature.arguments)
    args = list(signature.args)
    forms: dict[str, tuple[int, ...]] = {"init": (rows,), "streams": (steps, rows)}
    for name, sizes in forms.items():
        where = names.index(name)
        args[where] = tuple(TensorSpec((*sizes, *spec.shape[len(sizes) :]), spec.dtype) for spec in args[where])
    args[names.index("count")] = steps
    return OpSignature(signature.target, tuple(args), signature.kwargs, signature.outputs)
