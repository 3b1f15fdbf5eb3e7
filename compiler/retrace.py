"""Capturing the same call at other sizes, so that a proof can run on small ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..runtime.mesh import Mesh
from .capture import capture
from .capture.failures import without_torchs_log
from .capture.leaves import flatten_inputs
from .capture.sizes import label_dimensions
from .errors import HocketError
from .program import Program
from .verify.shrink import skeleton_difference


@dataclass(frozen=True)
class Retrace:
    """The call ``target(*args, **kwargs)``, to be captured again with some of its named sizes replaced.

    step: captures (args, kwargs) instead, where the program is more than the call (a whole training step).
    Call it with ``{"B": 2, "S": 3}``; sizes that are not mentioned stay. Raises CaptureError where the target does not trace there.
    """

    target: nn.Module | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    train: bool = True
    step: Callable[[tuple[Any, ...], dict[str, Any]], Program] | None = None

    def __call__(self, sizes: Mapping[str, int]) -> Program:
        """The program of the same call at other sizes; only shapes and dtypes of the inputs matter, not their values."""
        leaves, spec = flatten_inputs(self.args, self.kwargs)
        labels = label_dimensions({name: tuple(leaf.shape) for name, leaf in leaves if isinstance(leaf, Tensor)})
        resized = [
            _resized(leaf, [sizes.get(label or "", size) for label, size in zip(labels[name], leaf.shape, strict=True)])
            if isinstance(leaf, Tensor)
            else leaf.value
            for name, leaf in leaves
        ]
        args, kwargs = pytree.tree_unflatten(resized, spec)
        if self.step is not None:
            return self.step(tuple(args), kwargs)
        return capture(self.target, tuple(args), kwargs, train=self.train)


def _resized(tensor: Tensor, shape: list[int]) -> Tensor:
    made = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return made.requires_grad_(tensor.requires_grad)


def smaller_program(program: Program, retrace: Retrace, mesh: Mesh, *, skip: int = 0) -> Program | None:
    """The same program at sizes as small as it stays the same at, for a proof to run on; None where no size can shrink.

    A size shrinks to a multiple of the number of ranks (at least two rows a rank, so that an offset by one shows), different from
    the other sizes. Where shrinking all sizes changes the program (a loop over the sequence, a branch on the batch), each is tried
    alone. skip: leave out so many of the smallest sizes, for a program that differs from the first one in every size.
    """
    wanted = _small_sizes(program.sizes, mesh.size, skip)
    attempts = [wanted, *({name: size} for name, size in wanted.items())] if len(wanted) > 1 else [wanted]
    return same_program_at(attempts, program, retrace)


def same_program_at(attempts: Sequence[Mapping[str, int]], program: Program, retrace: Retrace) -> Program | None:
    """The first of some sizes at which the call is captured as the same program; None where it is another one at all of them."""
    for attempt in attempts:
        if not attempt:
            continue
        try:
            with without_torchs_log():
                small = retrace(attempt)
        except HocketError:
            continue  # the model refuses these sizes, as one whose input width is a parameter's does
        if not skeleton_difference(program, small):
            return small
    return None


def _small_sizes(sizes: Mapping[str, int], ranks: int, skip: int = 0) -> dict[str, int]:
    chosen: dict[str, int] = {}
    taken = {size for size in sizes.values() if size <= 2 * ranks or size % ranks}
    for name, size in sizes.items():
        if size % ranks == 0:
            candidates = (rows * ranks for rows in itertools.count(2) if rows * ranks not in taken)
            small = next(itertools.islice(candidates, skip * len(sizes), None))
            if small < size:
                chosen[name] = small
                taken.add(small)
    return chosen
