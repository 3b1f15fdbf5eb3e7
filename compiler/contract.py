"""What a pass is, what it promises, and what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from ..runtime.mesh import Mesh
from .program import Program

if TYPE_CHECKING:
    from .cost.cluster import Cluster
    from .plan.plan import Plan
    from .rules.table import RuleTable


@dataclass(frozen=True)
class Equal:
    """The new program computes the same function of the same inputs."""


@dataclass(frozen=True)
class EqualAfter:
    """An iteration that is exact once it has made ``sweeps`` sweeps (Jacobi)."""

    sweeps: int


@dataclass(frozen=True)
class Spec:
    """The new program computes ``reference`` (for example training on stale weights), not the original."""

    reference: Callable[[Program], Program]


@dataclass(frozen=True)
class Approx:
    """Equal up to a relative error; checked in floating point only, opt-in."""

    tolerance: float


Contract = Equal | EqualAfter | Spec | Approx


@dataclass(frozen=True)
class Context:
    """What passes may look at besides the program. plan: None until planning has run."""

    mesh: Mesh
    rules: RuleTable
    cluster: Cluster
    plan: Plan | None = None


class Pass(Protocol):
    """A frozen dataclass whose fields are its options; a pure function of the program."""

    name: ClassVar[str]
    contract: ClassVar[Contract]

    def __call__(self, program: Program, context: Context) -> Program:
        """The rewritten program, with a Decision for every candidate looked at."""
        ...
