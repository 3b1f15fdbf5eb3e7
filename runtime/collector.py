"""Working without Python's cyclic collector.

Tracing, planning, lowering and loading make up to hundreds of thousands of small objects that all stay. Each of the collector's
rounds walks over them and everything that torch holds, and finds next to nothing: at ten thousand nodes that is a third of the
time.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """No cyclic collection inside, unless the caller had switched it off anyway. Also a decorator; may be nested."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
