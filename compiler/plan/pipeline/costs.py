"""What the instructions of a pipeline cost: seconds of a processor and bytes of memory, per stage, and what a message costs.

A message costs processor time on both ends (that time does not overlap with computing where the processor does the copying) and
then a latency during which both may compute. Costs of a stage are those of a full micro-batch; one of ``size`` 0.5 costs half of
them, plus the fixed cost of an instruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ....runtime.errors import InputError
from ....runtime.schedule.instruction import Flow, Instr, Op, Schedule


@dataclass(frozen=True)
class StageCosts:
    """One stage, for a full micro-batch.

    forward, backward_input, backward_weight (per piece), recompute: seconds; backward: seconds of B, None where it is their sum;
    activation: bytes kept from F to the backward; held: per piece, bytes kept from I to its W; stash: bytes kept from F to R where
    the forward is recomputed; boundary: bytes that it sends to the next stage; products, factors: per piece, seconds of products
    that micro-batches may share, and bytes of what they multiply.
    """

    forward: float
    backward_input: float
    backward_weight: tuple[float, ...]
    backward: float | None = None
    recompute: float | None = None
    activation: float = 1.0
    held: tuple[float, ...] = (0.73,)
    stash: float = 0.0
    boundary: float = 0.0
    products: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.forward, self.backward_input, *self.backward_weight, self.activation, *self.held, self.stash, self.boundary)
        if not self.backward_weight or len(self.held) != len(self.backward_weight) or min(numbers) < 0:
            raise InputError(f"costs of a stage need one held size per piece and no negative number; found {self}")

    @property
    def pieces(self) -> int:
        """Into how many parts the weight gradient is cut."""
        return len(self.backward_weight)

    @property
    def work(self) -> float:
        """Seconds of F, I and all W."""
        return self.forward + self.backward_input + sum(self.backward_weight)

    def seconds(self, op: Op, piece: int = 0) -> float:
        """Of one instruction; 0 for those that do not compute."""
        match op:
            case Op.F:
                return self.forward
            case Op.I:
                return self.backward_input
            case Op.W:
                return self.backward_weight[piece]
            case Op.B:
                return self.backward if self.backward is not None else self.backward_input + sum(self.backward_weight)
            case Op.R:
                return self.recompute if self.recompute is not None else self.forward
            case _:
                return 0.0

    def change(self, op: Op, piece: int, *, recomputed: bool) -> float:
        """Bytes that one instruction adds (negative: frees). recomputed: the micro-batch has an R on this stage."""
        kept = self.stash if recomputed else self.activation
        match op:
            case Op.F:
                return kept
            case Op.R:
                return self.activation - self.stash
            case Op.I:
                return sum(self.held) - self.activation
            case Op.W:
                return -self.held[piece]
            case Op.B:
                return -self.activation
            case _:
                return 0.0


@dataclass(frozen=True)
class LinkCosts:
    """Seconds of a message of n bytes: ``send + n * send_byte`` on the sender's processor, then ``latency``, then on the reader's
    processor ``receive + n * receive_byte``."""

    latency: float = 0.0
    send: float = 0.0
    send_byte: float = 0.0
    receive: float = 0.0
    receive_byte: float = 0.0

    def sending(self, size: float) -> float:
        """Of the sender's processor."""
        return self.send + size * self.send_byte

    def receiving(self, size: float) -> float:
        """Of the reader's processor."""
        return self.receive + size * self.receive_byte


@dataclass(frozen=True)
class PipelineCosts:
    """Costs of every stage and of the links.

    fixed: seconds that an instruction costs whatever the size of the micro-batch; joined: products of so many micro-batches are
    made together, with the weight gradient of the last of them.
    """

    stages: tuple[StageCosts, ...]
    link: LinkCosts = field(default_factory=LinkCosts)
    fixed: float = 0.0
    joined: int = 1

    @classmethod
    def uniform(
        cls, stages: int, forward: float, backward_input: float, backward_weight: float, latency: float = 0.0
    ) -> PipelineCosts:
        """Equal stages, activations of one byte and 0.73 held, as theory likes them."""
        one = StageCosts(forward, backward_input, (backward_weight,))
        return cls((one,) * stages, LinkCosts(latency))

    @property
    def pieces(self) -> tuple[int, ...]:
        """Pieces of the weight gradient, per stage."""
        return tuple(stage.pieces for stage in self.stages)

    def seconds(self, instr: Instr, size: float) -> float:
        """Of an instruction for a micro-batch of that size."""
        stage = self.stages[instr.stage]
        if instr.op in (Op.SEND, Op.RECV):
            if instr.flow is Flow.ACTIVATION:
                maker = instr.stage if instr.op is Op.SEND else instr.stage - 1
            else:
                maker = instr.stage - 1 if instr.op is Op.SEND else instr.stage
            moved = self.stages[maker].boundary * size
            return self.link.sending(moved) if instr.op is Op.SEND else self.link.receiving(moved)
        plain = stage.seconds(instr.op, instr.piece)
        return plain * size + self.fixed if plain else 0.0

    def shifted(self, operation: tuple[Op, int, int, int], sizes: Sequence[float]) -> tuple[float, float]:
        """(seconds, bytes) that a weight gradient takes more, or less, since products are made with the last of their group.

        operation: (W or B, stage, micro-batch, piece); sizes: of all micro-batches.
        """
        op, number, m, piece = operation
        stage = self.stages[number]
        if self.joined == 1 or op not in (Op.W, Op.B) or not stage.products:
            return 0.0, 0.0
        pieces = slice(None) if op is Op.B else slice(piece, piece + 1)
        seconds, kept = sum(stage.products[pieces]), sum(stage.factors[pieces])
        if (m + 1) % self.joined and m + 1 < len(sizes):
            return -seconds * sizes[m], kept * sizes[m]
        earlier = sum(sizes[m - m % self.joined : m])
        return seconds * earlier, -kept * earlier

    def applied(self, schedule: Schedule) -> Schedule:
        """The schedule with every instruction's cost and memory filled in. InputError when stages or pieces do not agree."""
        if len(self.stages) != schedule.stages or self.pieces != schedule.pieces:
            raise InputError(
                f"costs of {len(self.stages)} stages in {self.pieces} pieces do not fit a schedule of {schedule.stages} stages in "
                f"{schedule.pieces} pieces"
            )
        recomputed = {(instr.stage, instr.micro_batch) for _, _, instr in schedule if instr.op is Op.R}
        sizes = [schedule.size(m) for m in range(schedule.micro_batches)]

        def priced(instr: Instr) -> Instr:
            size = schedule.size(instr.micro_batch)
            again = (instr.stage, instr.micro_batch) in recomputed
            kept = self.stages[instr.stage].change(instr.op, instr.piece, recomputed=again) * size
            more, bytes_ = self.shifted((instr.op, instr.stage, instr.micro_batch, instr.piece), sizes)
            cost = max(0.0, self.seconds(instr, size) + more)
            return instr._replace(cost=cost, memory=kept + bytes_ if schedule.training else 0.0)

        return schedule.with_ranks([[priced(instr) for instr in instructions] for instructions in schedule.ranks])


def in_pieces(costs: PipelineCosts, pieces: Sequence[int]) -> PipelineCosts:
    """The same costs with the weight gradient of stage s cut into ``pieces[s]`` equal parts."""

    def cut(stage: StageCosts, parts: int) -> StageCosts:
        weight, held = sum(stage.backward_weight) / parts, sum(stage.held) / parts
        products, factors = (sum(stage.products) / parts,) * parts, (sum(stage.factors) / parts,) * parts
        return replace(stage, backward_weight=(weight,) * parts, held=(held,) * parts, products=products, factors=factors)

    return replace(costs, stages=tuple(cut(stage, parts) for stage, parts in zip(costs.stages, pieces, strict=True)))
