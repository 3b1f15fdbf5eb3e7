"""Turns what went wrong inside a trace into one CaptureError: the user's line, the reason in a sentence, and the way out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..errors import CaptureError
from .sources import user_line

_WAYS = {
    "branch": (
        "Python needs the value of a tensor here (`if`, `.item()`, `float()`, `int()`, indexing a list with a tensor), and a "
        "captured program has one graph for every value",
        "choose with torch.where, keep the value as a tensor, or compute it outside the model and pass it in",
    ),
    "shape": (
        "the shape of the result depends on values of a tensor, and a captured program has fixed shapes",
        "use a mask of fixed shape (torch.where, a one-hot or scatter mask) instead of nonzero, unique or boolean indexing",
    ),
    "numpy": (
        "the values of a tensor leave torch here (numpy, storage or data pointer), and a trace has no values",
        "use the torch function of the same name, or wrap the code in torch.library.custom_op",
    ),
    "op": ("torch has no shape rule (fake kernel) for this op", "register one with torch.library.register_fake"),
}


def explain(error: BaseException, front: str) -> str:
    """One line: why a front end failed."""
    return f"{front} failed: {_reason(error)}"


def capture_error(error: BaseException, others: Sequence[tuple[str, BaseException]]) -> CaptureError:
    """The CaptureError of the first front end's failure; ``others`` are the later ones by name, and how they ended."""
    where = user_line(error.__traceback__) or "the model"
    kind = _kind(error)
    way_out = _WAYS[kind][1] if kind else "call the plain model with the same inputs; if it fails there too, mend it there"
    alike = [front for front, other in others if _reason(other) == _reason(error)]
    ends = [f"({' and '.join(alike)} failed likewise)"] if alike else []
    ends += [f"({explain(other, front)})" for front, other in others if front not in alike]
    return CaptureError(" ".join([f"cannot capture {where}: {_reason(error)}. Way out: {way_out}.", *ends]))


def _reason(error: BaseException) -> str:
    kind = _kind(error)
    return _WAYS[kind][0] if kind else f"{type(error).__name__}: {_first_line(error)}"


@contextlib.contextmanager
def without_torchs_log() -> Iterator[None]:
    """What torch logs of a failing trace would come before hocket's one message, and says less."""
    loggers = [logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _kind(error: BaseException) -> str:
    text = str(error)
    match error:
        case DataDependentOutputException():
            return "branch"
        case DynamicOutputShapeException():
            return "shape"
        case GuardOnDataDependentSymNode():
            return "branch"
        case UnsupportedOperatorException() | NotImplementedError():
            return "op" if isinstance(error, UnsupportedOperatorException) else ""
        case UnsupportedFakeTensorException():
            return "numpy"
    if isinstance(error, (RuntimeError, TypeError)) and any(
        key in text for key in ("numpy()", "data_ptr", "Cannot access data pointer", ".numpy")
    ):
        return "numpy"
    if "tracing" in text and ("boolean" in text or ".item()" in text or "control flow" in text):
        return "branch"
    return ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else "no message"


FATAL = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError, torch.OutOfMemoryError)
"""Never taken for a failure of a front end."""
