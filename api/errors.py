"""Every exception hocket raises on purpose."""

from .compiler.errors import (
    CaptureError,
    CollectiveMismatch,
    HocketError,
    InputError,
    PlanError,
    ProgramError,
    RankDied,
    RankFailed,
    RankHung,
    RuleError,
    RunError,
    UnsupportedError,
    VerificationError,
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
