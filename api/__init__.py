"""hocket: an ordinary PyTorch module, rewritten to run on many devices, and proven to compute the same function.

    model = hocket.parallelize(model, mesh="tp=2", example_args=(tokens,))
    loss = model(tokens, targets); loss.backward(); optimizer.step()

Names are imported when first used, so that a rank process that needs only the runtime does not load the compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compiler.capture import capture
    from .compiler.decoding.drafts import NGramDraft
    from .compiler.decoding.generate import generate
    from .compiler.decoding.orders import locality_order
    from .compiler.decoding.sample import sample
    from .compiler.doors.jacobi import Jacobi
    from .compiler.doors.overlap import OverlapTiles
    from .compiler.doors.parallelize import parallel, parallelize
    from .compiler.doors.pipeline.compile import PipelineParallel
    from .compiler.doors.sequential import sequential
    from .compiler.doors.train import train_step
    from .compiler.doors.vocabulary import VocabularyParallel
    from .compiler.plan.tactics import Auto, DataParallel, Rewrites, SequenceParallel, TensorParallel, Zero
    from .compiler.verify.standalone import verify
    from .passes.backward_split import SplitBackward
    from .runtime.mesh import Mesh

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "DataParallel",
    "Jacobi",
    "Mesh",
    "NGramDraft",
    "OverlapTiles",
    "PipelineParallel",
    "Rewrites",
    "SequenceParallel",
    "SplitBackward",
    "TensorParallel",
    "VocabularyParallel",
    "Zero",
    "capture",
    "generate",
    "locality_order",
    "parallel",
    "parallelize",
    "sample",
    "sequential",
    "train_step",
    "verify",
]

_HOME = {
    "Auto": ".compiler.plan.tactics",
    "DataParallel": ".compiler.plan.tactics",
    "Jacobi": ".compiler.doors.jacobi",
    "Mesh": ".runtime.mesh",
    "NGramDraft": ".compiler.decoding.drafts",
    "OverlapTiles": ".compiler.doors.overlap",
    "PipelineParallel": ".compiler.doors.pipeline.compile",
    "Rewrites": ".compiler.plan.tactics",
    "SequenceParallel": ".compiler.plan.tactics",
    "SplitBackward": ".passes.backward_split",
    "TensorParallel": ".compiler.plan.tactics",
    "VocabularyParallel": ".compiler.doors.vocabulary",
    "Zero": ".compiler.plan.tactics",
    "capture": ".compiler.capture",
    "generate": ".compiler.decoding.generate",
    "locality_order": ".compiler.decoding.orders",
    "parallel": ".compiler.doors.parallelize",
    "parallelize": ".compiler.doors.parallelize",
    "sample": ".compiler.decoding.sample",
    "sequential": ".compiler.doors.sequential",
    "train_step": ".compiler.doors.train",
    "verify": ".compiler.verify.standalone",
}


def __getattr__(name: str) -> object:
    if name == "errors":
        return import_module(".errors", __name__)
    if name in _HOME:
        value = getattr(import_module(_HOME[name], __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'hocket' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "errors", "__version__"])
