"""How a chain is to be solved, and how exactly: the part of a chain instruction that is a decision and not the meaning.

BITWISE     equality of successive iterates; the fixed point is unique, so a state that repeats is the loop's own
ROUNDING    they differ by a few units in the last place of the largest state: as far as another kernel would be off
TOL(eps)    they differ by eps of the largest state; the user asked for it
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

import torch

from ..errors import InputError, ProgramError

SOLVERS = ("auto", "sequential", "jacobi", "gauss-seidel", "blocks", "windows", "shooting", "newton")
NATIVES = ("rnn_tanh", "rnn_relu", "gru", "lstm")
"""Layers that torch has a kernel for (``native``)."""

ROUNDING_ULPS = 8
"""Largest difference under ROUNDING, in units of the last place of the largest state. A merge of two trajectories is seen at 2 to 4
of them; two kernels for one product differ by as much."""


@dataclass(frozen=True)
class How:
    """solver: one of SOLVERS; window: steps in a block or window (0: chosen at run time); exact: "bitwise", "rounding" or a
    relative tolerance; sweeps: if not 0, exactly so many Jacobi sweeps from zero and no test (exact on the first ``sweeps`` steps);
    native: the layer of torch, one of NATIVES, that the whole chain is, or "": "auto" may run its kernel instead.
    """

    solver: str = "sequential"
    window: int = 0
    exact: str | float = "rounding"
    sweeps: int = 0
    native: str = ""

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise InputError(f"expected a solver among {', '.join(SOLVERS)}; found {self.solver!r}")
        if self.exact not in ("bitwise", "rounding") and not (isinstance(self.exact, float) and 0 < self.exact < 1):
            raise InputError(f'expected exact="bitwise", "rounding" or a tolerance between 0 and 1; found {self.exact!r}')
        if self.native and self.native not in NATIVES:
            raise InputError(f"expected a layer among {', '.join(NATIVES)}; found {self.native!r}")
        if self.window < 0 or self.sweeps < 0:
            raise InputError(f"window and sweeps are counts; found {self.window} and {self.sweeps}")

    @classmethod
    def parse(cls, solver: str, exact: str | float = "rounding") -> How:
        """``"auto"``, ``"blocks"``, ``"blocks:64"`` and the like. InputError for anything else."""
        name, _, window = solver.partition(":")
        if window and not window.isdigit():
            raise InputError(f'expected a solver such as "auto" or "blocks:64"; found {solver!r}')
        return cls(name, int(window or 0), exact)

    def tolerance(self, dtype: torch.dtype) -> float:
        """Largest relative change of a state that counts as none; 0 asks for equality."""
        if not dtype.is_floating_point or self.exact == "bitwise":
            return 0.0
        return ROUNDING_ULPS * _epsilon(dtype) if self.exact == "rounding" else float(self.exact)

    def exactness(self, dtype: torch.dtype) -> str:
        """The class a chain of this dtype belongs to."""
        if self.tolerance(dtype) == 0.0 or self.solver == "sequential":
            return "BITWISE"
        return "ROUNDING" if self.exact == "rounding" else f"TOL({self.exact:g})"

    def to_json(self) -> str:
        """Deterministic text; ``read_how`` restores it."""
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return f"{self.solver}:{self.window}" if self.window else self.solver


@functools.cache
def _epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@functools.lru_cache(maxsize=512)
def read_how(text: str) -> How:
    """The decision in ``text``; ProgramError when it is none."""
    try:
        return How(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ProgramError(f"a chain says how it is to be solved in a way that cannot be read: {error}") from error
