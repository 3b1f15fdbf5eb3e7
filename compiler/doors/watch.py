"""Notices when the user has put other tensors behind a module's names since the ranks were told where to read."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class StateWatch:
    """Remembers every parameter and buffer of a module and where its memory is; ``changed`` names the first that moved.

    In-place changes (an optimizer step, ``load_state_dict``) are seen by the ranks as they happen and need no watching. What does:
    ``p.data = other``, ``load_state_dict(assign=True)``, ``module.to(dtype)``, a submodule's parameter replaced or frozen.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen = [
            (owner._parameters, name, f"{prefix}{name}", *_identity(tensor))
            for prefix, owner, name, tensor in _slots(module, buffers=False)
        ] + [
            (owner._buffers, name, f"{prefix}{name}", *_identity(tensor))
            for prefix, owner, name, tensor in _slots(module, buffers=True)
        ]

    def changed(self) -> str:
        """Qualified name of the first tensor that is not what it was, "" if none."""
        for table, key, name, tensor, address, requires_grad in self._seen:
            now = table.get(key)
            if now is not tensor or (now is not None and (_address(now) != address or now.requires_grad != requires_grad)):
                return name
        return ""


def state_of(module: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Parameters and buffers by (kind, qualified name), every name of a tied tensor included."""
    found: dict[tuple[str, str], Tensor] = {}
    for kind, items in (
        ("param", module.named_parameters(remove_duplicate=False)),
        ("buffer", module.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in items:
            found[kind, name] = tensor
    return found


def _slots(module: nn.Module, *, buffers: bool) -> Iterator[tuple[str, nn.Module, str, Tensor | None]]:
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        table = owner._buffers if buffers else owner._parameters
        for name, tensor in table.items():
            yield prefix, owner, name, tensor


def _identity(tensor: Tensor | None) -> tuple[Tensor | None, int, bool]:
    return (None, 0, False) if tensor is None else (tensor, _address(tensor), tensor.requires_grad)


def _address(tensor: Tensor) -> int:
    """Where the memory of a tensor, or of this rank's piece of it, begins."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).data_ptr()
