"""Turns what went wrong inside a trace into one CaptureError: the user's line, the reason in a sentence, and the way out."""

from __future__ import annotations

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
    kind = _kind(error)
    reason = _WAYS[kind][0] if kind else f"{type(error).__name__}: {_first_line(error)}"
    return f"{front} failed: {reason}"


def capture_error(error: BaseException, others: list[str]) -> CaptureError:
    """The CaptureError of the first front end's failure; ``others`` says how the later ones ended."""
    where = user_line(error.__traceback__) or "the model"
    kind = _kind(error)
    if kind:
        reason, way_out = _WAYS[kind]
        message = f"cannot capture {where}: {reason}. Way out: {way_out}."
    else:
        found = f"{type(error).__name__}: {_first_line(error)}"
        message = f"cannot capture {where}: {found}. Way out: make this line run under plain autograd first."
    return CaptureError(" ".join([message, *(f"({other})" for other in others)]))


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
