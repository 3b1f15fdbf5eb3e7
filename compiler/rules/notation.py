"""A one-line notation for rules: name the dimensions, and every lower-case name can be cut.

    "m k, k n -> m n +k"

Cutting ``m``: Shard where a tensor has ``m``, Replicate elsewhere. Cutting ``k``: the output says ``+k``, it is a sum over k, so
its pieces are partial sums. The same mark on an *input* says that it is added to such a sum once and must come in partial (a
bias).

    M        upper case: never cut                 *    any number of dimensions that can be cut, aligned from the left
    _        one dimension that is never cut       _*   any number of dimensions that are never cut
    +*       a sum over all dimensions of ``*``    ""   a tensor without dimensions

A dimension of size 1 under a name that is longer elsewhere is broadcast: it stays whole while the others are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..layout import Partial, Placement, Replicate, Shard
from .rule import Rule
from .signature import OpSignature, TensorSpec


@dataclass(frozen=True)
class Term:
    """Names of one tensor's dimensions ("" for one that is never cut) and the names over which it is a sum."""

    names: tuple[str, ...]
    sums: frozenset[str]


def annotated_rules(signature: OpSignature, text: str, arguments: Sequence[str], origin: str) -> Iterator[Rule]:
    """The rules that one line of notation gives for a signature; nothing when its ranks do not match.

    arguments: the schema's tensor arguments in order; those the call leaves out have no placement.
    """
    left, right = text.split("->")
    written = [part.strip() for part in left.split(",")]
    by_name = dict(zip(arguments, written, strict=True))
    inputs = [_term(by_name[name], spec) for name, spec in zip(signature.tensor_names, signature.tensors, strict=True)]
    results = [part.strip() for part in right.split(",")]
    results += [""] * (len(signature.outputs) - len(results))
    if len(results) > len(signature.outputs):
        return
    outputs = [None if s is None else _term(part, s) for part, s in zip(results, signature.outputs, strict=True)]
    if None in inputs or any(o is None and s is not None for o, s in zip(outputs, signature.outputs, strict=True)):
        return
    terms = [term for term in inputs if term is not None]
    sizes: dict[str, int] = {}
    for term, spec in zip(terms, signature.tensors, strict=True):
        for name, size in zip(term.names, spec.shape, strict=True):
            if name:
                sizes[name] = max(size, sizes.get(name, 1))
    for name, size in sizes.items():
        if size > 1:
            placed = tuple(_place(term, spec, name) for term, spec in zip(terms, signature.tensors, strict=True))
            made = tuple(
                None if t is None or s is None else _place(t, s, name) for t, s in zip(outputs, signature.outputs, strict=True)
            )
            yield Rule(placed, made, origin)


def _place(term: Term, spec: TensorSpec, name: str) -> Placement:
    if name in term.names and spec.shape[term.names.index(name)] > 1:
        return Shard(term.names.index(name))
    return Partial() if name in term.sums or (name.startswith("*") and "*" in term.sums) else Replicate()


def _term(text: str, spec: TensorSpec) -> Term | None:
    """The term for a tensor of these sizes; None when the number of dimensions differs."""
    tokens = [token for token in text.split() if not token.startswith("+")]
    sums = frozenset(token[1:] for token in text.split() if token.startswith("+"))
    free = len(spec.shape) - sum(token not in ("*", "_*") for token in tokens)
    names: list[str] = []
    for token in tokens:
        if token == "*":
            names += [f"*{k}" for k in range(free)]
        elif token == "_*":
            names += [""] * free
        else:
            names.append(token if token.islower() else "")
    return Term(tuple(names), sums) if len(names) == len(spec.shape) else None
