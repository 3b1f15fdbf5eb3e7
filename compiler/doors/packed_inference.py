"""Serve a model in stages, every batch on as many packed tokens as it has valid ones (DRCE in EnergonAI's pipeline, 2209.02341).

The model is compiled for several numbers of tokens (``capacities``), each proven before it serves: in double precision, on batches
with random padding, it gives what the model gives, with zeros at padding. A request takes the smallest program that holds its
tokens; where packing saves nothing, that is the model on the whole batch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ...passes.backward_split_costs import Costs
from ...passes.packed_tokens import PackedTokens
from ...passes.pipeline import cut_stages
from ...runtime.errors import InputError
from ...runtime.mesh import Mesh
from ...runtime.schedule.serve import InferencePipeline, StageCall, stage_calls
from ...runtime.schedule.stage import Port
from ..capture import capture
from ..contract import Context
from ..cost.cluster import Cluster
from ..errors import VerificationError
from ..plan.pipeline.stage_code import states_of
from ..program import Decision, Program, Role, RoleKind
from ..rules.table import RuleTable
from ..verify.differential import compare_programs
from ..verify.samples import sample_inputs
from .pipeline.units import partition

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Capacities as shares of the batch's tokens."""

TRIALS = 3
"""Batches with random padding on which a packed program must give what the model gives."""


@dataclass(frozen=True)
class Packing:
    """What is packed, and for how many tokens.

    mask: name of the keyword argument [rows, positions] that is nonzero where a token is valid; shares: capacities, as shares of
    all tokens; least_gain: see ``PackedTokens``.
    """

    mask: str
    shares: tuple[float, ...] = SHARES
    least_gain: float = 0.03

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise InputError(f"shares are capacities between 0 and 1 of the batch's tokens; found {self.shares}")


@dataclass(frozen=True)
class PackedProgram:
    """The model for at most ``capacity`` valid tokens. program: verified; decisions: whether packing was applied, and why."""

    capacity: int
    program: Program
    decisions: tuple[Decision, ...]

    @property
    def applied(self) -> bool:
        """Whether it runs on packed tokens."""
        return any(decision.applied for decision in self.decisions)


class PackedInference:
    """A model behind a pipeline of stages in this process. Use it as a context manager, or ``close`` it.

    args, kwargs: an example call; all requests have its shapes. stages: how many; depth: see ``InferencePipeline``. Raises
    InputError for a mask that is none, VerificationError for a model whose results depend on what stands in the padding.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        packing: Packing,
        *,
        stages: int = 2,
        depth: int = 2,
    ) -> None:
        if packing.mask not in kwargs:
            raise InputError(f"the mask is one of the keyword arguments {sorted(kwargs)}; found {packing.mask!r}")
        with _frozen(model):
            program = capture(model, args, dict(kwargs))
        self._mask, self._signature = f"kwargs[{packing.mask!r}]", program.signature
        tokens = kwargs[packing.mask].numel()
        context = Context(Mesh.parse("d=1"), RuleTable(), Cluster.current())
        wanted = sorted({max(1, round(share * tokens)) for share in (*packing.shares, 1.0)})
        passes = [PackedTokens(self._mask, capacity, packing.least_gain) for capacity in wanted]
        self.programs = tuple(packed_program(program, one, context) for one in passes)
        tensors = {Port("param", name): p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
        tensors |= {Port("buffer", name): b for name, b in model.named_buffers(remove_duplicate=False)}
        calls = [_calls(one.program, stages, Costs(context.cluster), tensors) for one in self.programs]
        self._pipeline = InferencePipeline([self._stage(calls, number) for number in range(stages)], depth)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Of every capacity: whether packing pays."""
        return tuple(decision for one in self.programs for decision in one.decisions)

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Hand in a call of the model; the result is the model's, with zeros at padding. Blocks while the queue is full."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._signature.in_spec:
            raise InputError(f"expected a call like the example, {self._signature.in_spec}; found {spec}")
        given = {
            self._signature.inputs[place].name: leaf
            for leaf, place in zip(leaves, self._signature.in_leaves, strict=True)
            if isinstance(place, int)
        }
        return self._pipeline.submit(given)

    def close(self) -> None:
        """Finish what was submitted."""
        self._pipeline.close()

    def __enter__(self) -> PackedInference:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stage(self, calls: Sequence[Sequence[StageCall]], number: int) -> StageCall:
        """A stage of every program behind one call: the first one chooses the program, the last one gives the model's result."""
        capacities, last = [one.capacity for one in self.programs], number == len(calls[0]) - 1

        def call(value: Any) -> Any:
            if number == 0:
                value = (bisect.bisect_left(capacities, int(torch.count_nonzero(value[self._mask]))), value)
            chosen, inner = value
            result = calls[chosen][number](inner)
            return self._result(result) if last else (chosen, result)

        return call

    def _result(self, outputs: Mapping[str, torch.Tensor]) -> Any:
        signature = self._signature
        assert signature.out_spec is not None, "a captured program has the tree of its outputs"
        leaves = [
            outputs[signature.outputs[place].name] if isinstance(place, int) else place.value for place in signature.out_leaves
        ]
        return pytree.tree_unflatten(leaves, signature.out_spec)


def packed_program(program: Program, one: PackedTokens, context: Context) -> PackedProgram:
    """The program on packed tokens, where that pays, proven. Raises VerificationError where a result depends on padding."""
    packed = one(program, context)
    for seed in range(TRIALS):
        inputs = _with_padding(sample_inputs(program, seed), one.mask, one.capacity, seed)
        comparison = compare_programs(one.reference(program), packed, inputs=inputs, growth=False)
        if comparison.differences:
            raise VerificationError(
                f"on {one.capacity} packed tokens the model gives other results at valid tokens, so it is not served: "
                f"{comparison.differences[0]}; do its results depend on what stands in the padding? {comparison.divergence}"
            )
    return PackedProgram(one.capacity, packed, packed.decisions[len(program.decisions) :])


def _with_padding(inputs: dict[Role, torch.Tensor], mask: str, capacity: int, seed: int) -> dict[Role, torch.Tensor]:
    """The inputs with a mask of at most ``capacity`` valid tokens, at least one in as many rows as can have one."""
    (role,) = (role for role in inputs if role.kind is RoleKind.INPUT and role.name == mask)
    rows, length = inputs[role].shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, length, generator=generator)
    drawn[torch.arange(rows), torch.randint(0, length, (rows,), generator=generator)] += 1.0
    chosen = drawn.flatten().topk(min(capacity, max(rows, capacity - seed))).indices
    valid = torch.zeros(rows * length, dtype=inputs[role].dtype).index_fill_(0, chosen, 1)
    return {**inputs, role: valid.view(rows, length)}


def _calls(program: Program, stages: int, costs: Costs, tensors: Mapping[Port, torch.Tensor]) -> list[StageCall]:
    pipeline = cut_stages(program, partition(program, stages, costs))
    return stage_calls(states_of(pipeline, tensors))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient inside."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)  # noqa: FBT003
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)  # noqa: FBT003
