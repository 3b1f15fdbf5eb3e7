"""Products of tensors of different dtypes: eager kernels refuse them, fake tensors let most of them pass."""

from __future__ import annotations

import torch

from ..errors import CaptureError
from ..program import Program, note, tensor_inputs

_aten = torch.ops.aten
_ONE_DTYPE = frozenset(
    {
        _aten.mm.default,
        _aten.addmm.default,
        _aten.bmm.default,
        _aten.baddbmm.default,
        _aten.mv.default,
        _aten.addmv.default,
        _aten.dot.default,
        _aten.convolution.default,
    }
)


def check_dtypes(program: Program) -> None:
    """Raises CaptureError naming the user's line where a kernel would refuse its inputs for their dtypes."""
    for node in program.nodes:
        if node.target not in _ONE_DTYPE:
            continue
        dtypes = list(dict.fromkeys(str(given.meta["val"].dtype)[6:] for given in tensor_inputs(node)))
        if len(dtypes) > 1:
            raise CaptureError(
                f"cannot capture {note(node).source or 'the model'}: {node.target} takes tensors of one dtype; found "
                f"{' and '.join(dtypes)}. Way out: convert the input, x.to(dtype), or the model, model.to(dtype)"
            )
