"""Property-based testing of models and passes: random programs, shapes, meshes and plans, and ``assert_equivalent``.

    from hypothesis import given
    from hocket.testing import assert_equivalent, meshes, plans, programs

The strategies need hypothesis (``pip install hocket[testing]``); ``assert_equivalent`` does not, nor does ``trace_ranks``, which
traces a function of torch's collectives for every rank, so that ``hocket.verify`` can compare it with a function of one process.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..compiler.verify.tracing import trace_ranks
    from .equivalence import assert_equivalent
    from .strategies import meshes, plans, programs, shapes

__all__ = ["assert_equivalent", "meshes", "plans", "programs", "shapes", "trace_ranks"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'hocket.testing' has no attribute {name!r}")
    if name == "assert_equivalent":
        return getattr(import_module(".equivalence", __name__), name)
    if name == "trace_ranks":
        return getattr(import_module("..compiler.verify.tracing", __name__), name)
    try:
        import_module("hypothesis")
    except ModuleNotFoundError as error:
        raise ImportError(f"hocket.testing.{name} needs hypothesis; install it with: pip install 'hocket[testing]'") from error
    return getattr(import_module(".strategies", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
