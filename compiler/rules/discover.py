"""Find rules by trying: run an op on pieces under every small combination of cuts and see what the pieces make.

For ops that neither torch's tables nor ours know. Only cuts are tried as inputs: that a cut commutes with an op on random values is
strong evidence, that a *sum* does is not (``clamp(x, -1e4, 1e4)``), so linearity stays a matter of declaration.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from ..layout import Partial, Placement, Replicate, Shard
from .localise import names_sizes
from .pieces import represents
from .rule import Rule
from .shrink import Trial
from .validate import fits, pieces_of_outputs

MAX_TENSORS = 6
MAX_COMBINATIONS = 250
"""Budget of one op: about a tenth of a second."""

UNSAFE_WORDS = (
    "scaled_dot_product",
    "flash",
    "mkldnn",
    "rnn",
    "lstm",
    "gru",
    "cudnn",
    "sparse",
    "quantize",
    "max_unpool",
    "_pool",
    "weight_norm",
)
"""Native kernels that trust their inputs: never run on combinations that nobody vouches for."""


def discover(trial: Trial) -> Iterator[Rule]:
    """Rules that held on the small sizes of the trial."""
    signature = trial.signature
    name = str(signature.target)
    if not signature.tensors or len(signature.tensors) > MAX_TENSORS or any(word in name for word in UNSAFE_WORDS):
        return
    if names_sizes(signature.target):
        return  # the local size of the output would have to be guessed as well
    for inputs in itertools.islice(_combinations(trial), MAX_COMBINATIONS):
        outputs = _outputs(trial, inputs)
        if outputs is not None:
            yield Rule(inputs, outputs, "discovered")


def _combinations(trial: Trial) -> Iterator[tuple[Placement, ...]]:
    """Every input whole or cut in one dimension, those that cut fewest first; never all whole."""
    options: list[list[Placement]] = []
    for spec in trial.signature.tensors:
        cuts: list[Placement] = [Shard(dim) for dim, size in enumerate(spec.shape) if size >= trial.parts]
        options.append([Replicate(), *cuts])
    everything = [c for c in itertools.product(*options) if any(isinstance(p, Shard) for p in c)]
    yield from sorted(everything, key=lambda c: sum(isinstance(p, Shard) for p in c))


def _outputs(trial: Trial, inputs: tuple[Placement, ...]) -> tuple[Placement | None, ...] | None:
    """The placements that every kind of values agrees on; None when there are none."""
    whole = tuple(None if spec is None else Replicate() for spec in trial.outputs)
    probe = Rule(inputs, whole, "discovered")
    if not fits(probe, trial.signature.with_outputs(trial.outputs), trial.parts):
        return None
    found: list[Placement | None] | None = None
    for values, wholes in trial.runs:
        try:
            per_rank = pieces_of_outputs(trial, probe, values)
        except Exception:  # the pieces do not fit the op: not a rule
            return None
        row: list[Placement | None] = []
        for position, expected in enumerate(wholes):
            if not isinstance(expected, torch.Tensor):
                row.append(None)
                continue
            placement = _placement([outputs[position] for outputs in per_rank], expected)
            if placement is None:
                return None
            row.append(placement)
        if found is not None and row != found:
            return None
        found = row
    return None if found is None else tuple(found)


def _placement(pieces: Sequence[object], whole: torch.Tensor) -> Placement | None:
    tensors = [piece for piece in pieces if isinstance(piece, torch.Tensor)]
    if len(tensors) != len(pieces):
        return None
    cuts: list[Placement] = [Shard(dim) for dim in range(whole.ndim)]
    for placement in (Replicate(), *cuts, Partial()):
        if all(piece.ndim == whole.ndim for piece in tensors) and represents(tensors, placement, whole):
            return placement
    return None
