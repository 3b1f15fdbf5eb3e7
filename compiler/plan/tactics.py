"""What a person asks of one mesh axis. A tactic fixes how inputs and results lie on its axis and names the moves it does without;
the solver fills in everything else, so that tactics, constraints and automatic axes combine freely.

    DataParallel      inputs cut along the batch, parameters whole; gradients are summed once
    Zero              the same, with parameters (stage 3), gradients (2) and optimizer state (1) cut too  (arXiv 1910.02054)
    TensorParallel    inputs whole, the weights of dense products cut; partial sums are all-reduced       (arXiv 1909.08053)
    SequenceParallel  the same, with activations cut along the sequence in between                        (arXiv 2205.05198, 4.2.2)

Ports are hard constraints. Moves to do without are avoided at almost any cost but not forbidden: an op that has no rule along the
batch still gets its whole input, and the plan says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..contract import Pass
from ..layout import Partial, Placement, Replicate, Shard
from ..program import Role, RoleKind
from ..rules.chains import is_chain
from ..rules.rule import Rule

Placements = tuple[Placement, ...]


@dataclass(frozen=True)
class RewriteTactic:
    """What a person asks of the program rather than of one mesh axis. Every placement stays as the other tactics leave it.

    The passes it names run in order and are proven like any other: those before see the logical program that is then planned and
    sharded, those after see the sharded one. in_pipelines: whether passes that come before may run on a whole step before a
    pipeline cuts it into stages.
    """

    in_pipelines: ClassVar[bool] = False

    def rewrites_before(self) -> tuple[Pass, ...]:
        """Passes over the logical program, before planning."""
        return ()

    def rewrites_after(self) -> tuple[Pass, ...]:
        """Passes over the sharded program."""
        return ()

    def places(self) -> tuple[Tactic, ...]:
        """Tactics for mesh axes that the rewriting needs."""
        return ()

    def while_capturing(self) -> contextlib.AbstractContextManager[object]:
        """What the model is to be captured within, at full and at small sizes."""
        return contextlib.nullcontext()


@dataclass(frozen=True)
class Rewrites(RewriteTactic):
    """Passes of your own: ``tactics=[TensorParallel("tp"), Rewrites(after=(MyPass(),))]``."""

    before: tuple[Pass, ...] = ()
    after: tuple[Pass, ...] = ()

    def rewrites_before(self) -> tuple[Pass, ...]:
        """The passes given as ``before``."""
        return self.before

    def rewrites_after(self) -> tuple[Pass, ...]:
        """The passes given as ``after``."""
        return self.after


def rewrites_of(tactics: Sequence[Tactic | RewriteTactic] | str) -> tuple[RewriteTactic, ...]:
    """Those of the tactics that rewrite, in order."""
    return () if isinstance(tactics, str) else tuple(t for t in tactics if isinstance(t, RewriteTactic))


@contextlib.contextmanager
def capturing(tactics: Sequence[Tactic | RewriteTactic] | str) -> Iterator[None]:
    """Within what every tactic wants a model to be captured in."""
    with contextlib.ExitStack() as stack:
        for tactic in rewrites_of(tactics):
            stack.enter_context(tactic.while_capturing())
        yield


def placing_tactics(tactics: Sequence[Tactic | RewriteTactic] | str) -> Sequence[Tactic] | str:
    """Those of the tactics that place, ``"auto"`` where none does."""
    if isinstance(tactics, str):
        return tactics
    given = [t for t in tactics if not isinstance(t, RewriteTactic)]
    return given + [t for rewrite in rewrites_of(tactics) for t in rewrite.places()] or "auto"


@dataclass(frozen=True)
class Port:
    """An input or result of the program, as a tactic sees it.

    placements: those its sizes allow on the axis, Replicate first; is_batched: its first dimension is the batch; cut_by_products:
    the ways a dense product that reads this weight can take it cut.
    """

    role: Role
    shape: tuple[int, ...]
    placements: Placements
    is_batched: bool = False
    cut_by_products: Placements = ()

    @property
    def cuts(self) -> Placements:
        """The placements that cut it."""
        return tuple(p for p in self.placements if isinstance(p, Shard))


@dataclass(frozen=True)
class Move:
    """A change of placement of one value along the tactic's axis.

    rank: number of dimensions; from_input: whether the value depends on the inputs of this step (parameters and their views and
    casts do not); to_port: whether it goes out as a result, or becomes the new value of an input.
    """

    source: Placement
    target: Placement
    rank: int
    from_input: bool
    to_port: bool


@dataclass(frozen=True)
class Promises:
    """What planning was asked to keep: gradients_like_parameters, and has_state: whether the optimizer is in the program."""

    gradients_like_parameters: bool
    has_state: bool


@dataclass(frozen=True)
class Tactic:
    """One intention for one mesh axis. This base has none: subclasses say what they fix and what they do without.

    axis: name of the mesh axis. cuts_to_save_memory: whether its cuts of stored tensors are wishes, which yield to other axes.
    """

    axis: str
    cuts_to_save_memory: ClassVar[bool] = False

    def objection(self, _promises: Promises) -> str:
        """Why this tactic makes no sense here, or ""."""
        return ""

    def allowed(self, _port: Port) -> Placements | None:
        """Placements that a port may have, None to leave it to the solver."""
        return None

    def avoids(self, _move: Move) -> bool:
        """Whether this tactic does without such a move."""
        return False

    def rules(self, _target: object, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        """Those of an op's rules that may be chosen on this axis; at least one."""
        return rules


@dataclass(frozen=True)
class Auto(Tactic):
    """Everything on this axis is the solver's choice."""


@dataclass(frozen=True)
class TimeParallel(Tactic):
    """Chains are cut, whatever else is: their segments lie over the ranks of this axis (``Jacobi(axis=...)``)."""

    def rules(self, target: object, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        """The cutting rule of a chain, where it has one."""
        cutting = tuple(rule for rule in rules if not rule.is_replicate)
        return cutting if is_chain(target) and cutting else rules


@dataclass(frozen=True)
class DataParallel(Tactic):
    """Inputs cut along their first dimension, parameters, buffers and optimizer state whole."""

    def allowed(self, port: Port) -> Placements | None:
        """Batched inputs cut, stored inputs and the rest whole."""
        if port.role.kind is RoleKind.INPUT:
            return (Shard(0),) if port.is_batched else (Replicate(),)
        if port.role.kind in (RoleKind.PARAM, RoleKind.BUFFER, RoleKind.STATE):
            return (Replicate(),)
        return None

    def avoids(self, move: Move) -> bool:
        """Activations never change hands."""
        return _moves_activations(move)


@dataclass(frozen=True)
class Zero(Tactic):
    """Data parallel with the stored tensors cut too.

    stage 1: optimizer state; 2: and gradients; 3: and parameters, which are gathered where they are used. Stage 1 needs the
    optimizer in the program; stage 2 that, or gradients that may lie otherwise than their parameters.
    """

    stage: int = 3
    cuts_to_save_memory: ClassVar[bool] = True

    def objection(self, promises: Promises) -> str:
        """Stages that do not exist, or that nothing in the program answers to."""
        if self.stage not in (1, 2, 3):
            return f"ZeRO has stages 1, 2 and 3; found {self.stage}"
        if self.stage == 1 and not promises.has_state:
            return "stage 1 cuts optimizer state, but this program holds no optimizer: use stage 3, or hocket.train_step"
        if self.stage == 2 and promises.gradients_like_parameters:
            return 'stage 2 cuts gradients but not parameters, while gradients="like-params" wants both alike: use stage 3'
        return ""

    def allowed(self, port: Port) -> Placements | None:
        """Batched inputs cut; what the stage names cut wherever its sizes allow, the other stored tensors whole."""
        kind = port.role.kind
        if kind is RoleKind.INPUT:
            return (Shard(0),) if port.is_batched else (Replicate(),)
        if kind is RoleKind.BUFFER:
            return (Replicate(),)
        since = {RoleKind.STATE: 1, RoleKind.GRADIENT: 2, RoleKind.PARAM: 3}.get(kind)
        if since is None:
            return None
        if self.stage >= since:
            return port.cuts or (Replicate(),)
        return None if kind is RoleKind.GRADIENT else (Replicate(),)

    def avoids(self, move: Move) -> bool:
        """Activations never change hands, parameters may; from stage 2 on gradients are scattered as they are summed."""
        sums_whole = isinstance(move.source, Partial) and isinstance(move.target, Replicate)
        return _moves_activations(move) or (self.stage > 1 and sums_whole and move.from_input and move.rank > 1)


@dataclass(frozen=True)
class TensorParallel(Tactic):
    """Inputs whole, every weight of a dense product cut where a rule allows it, partial sums all-reduced."""

    def allowed(self, port: Port) -> Placements | None:
        """Inputs whole, weights cut."""
        return _tensor_parallel(port)

    def avoids(self, move: Move) -> bool:
        """Weights are never gathered; activations are all-reduced or gathered, never cut (heads may be)."""
        if not move.from_input:
            return _moves_weight(move)
        cuts_heads = isinstance(move.source, Replicate) and move.rank > 3
        return isinstance(move.target, Shard) and not cuts_heads and not move.to_port


@dataclass(frozen=True)
class SequenceParallel(Tactic):
    """Tensor parallel whose activations are cut along ``dim`` (the sequence) between the dense products."""

    dim: int = 1

    def allowed(self, port: Port) -> Placements | None:
        """Inputs whole, weights cut."""
        return _tensor_parallel(port)

    def avoids(self, move: Move) -> bool:
        """Weights are never gathered; activations are whole or cut along the sequence, and partial ones become the latter."""
        if not move.from_input:
            return _moves_weight(move)
        if move.to_port or move.rank < 2:
            return False
        along_sequence = move.target == Shard(self.dim) and move.rank > 2
        match move.source:
            case Partial():
                return not along_sequence
            case Shard():
                return isinstance(move.target, Shard)
        return not along_sequence and move.rank < 4


def _tensor_parallel(port: Port) -> Placements | None:
    if port.role.kind is RoleKind.INPUT:
        return (Replicate(),)
    if port.role.kind is RoleKind.PARAM:
        return port.cut_by_products or None
    return None


def _moves_weight(move: Move) -> bool:
    return isinstance(move.source, Shard) and move.rank > 1


def _moves_activations(move: Move) -> bool:
    """A cut value of this step that is gathered or cut otherwise, except on its way out."""
    return move.from_input and not move.to_port and isinstance(move.source, Shard)
