"""The compile-time half of hocket's exceptions; the base class and the run-time half live in ``runtime/errors.py``."""

from __future__ import annotations

from ..runtime.errors import (
    CollectiveMismatch,
    HocketError,
    InputError,
    ProgramError,
    RankDied,
    RankFailed,
    RankHung,
    RunError,
)

__all__ = [
    "CaptureError",
    "CollectiveMismatch",
    "HocketError",
    "InputError",
    "PlanError",
    "ProgramError",
    "RankDied",
    "RankFailed",
    "RankHung",
    "RuleError",
    "RunError",
    "UnsupportedError",
    "VerificationError",
]


class CaptureError(HocketError):
    """The model could not be traced into one graph; the message names its line and the way out."""


class RuleError(HocketError):
    """A sharding rule is wrong or cannot be applied at these shapes."""


class PlanError(HocketError):
    """No plan satisfies the constraints; the message names both sides of the conflict."""


class VerificationError(HocketError):
    """A rewrite does not compute the same function; its result was not returned."""


class UnsupportedError(HocketError):
    """A construct that hocket does not handle here, with the reason and the way out."""
