"""What a rank tells of an exception: enough for the controller to name the cause, and to tell it from its shadow."""

from __future__ import annotations

import traceback
from typing import Any

import torch

from .chunks import ExchangeError
from .errors import RunError
from .transports.transport import TransportError

_MAX_MESSAGE, _MAX_TRACEBACK = 2000, 40_000
_COMMUNICATION = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL", "Socket Timeout", "Broken pipe")
_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc", "Unable to mmap")


def report_of(error: Exception) -> dict[str, Any]:
    """Plain data about an exception; of one that an executor has wrapped, about the original.

    memory: whether the rank ran out of memory; communication: whether it looks like the consequence of another rank's failure.
    """
    cause = error.__cause__ if isinstance(error, RunError) and error.__cause__ is not None else error
    text = str(cause)
    broken = isinstance(cause, RuntimeError | OSError) and any(mark in text for mark in _COMMUNICATION)
    return {
        "type": type(cause).__name__,
        "message": text[:_MAX_MESSAGE],
        "traceback": "".join(traceback.format_exception(cause))[-_MAX_TRACEBACK:],
        "memory": isinstance(cause, MemoryError | torch.OutOfMemoryError) or any(mark in text for mark in _MEMORY),
        "communication": isinstance(cause, ExchangeError | TransportError) or broken,
    }
