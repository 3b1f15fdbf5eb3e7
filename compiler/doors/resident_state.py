"""The optimizer's state while ranks update it: the very tensors that the optimizer holds, so that its ``state_dict`` is true."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class ResidentState:
    """tensors: by name, ``exp_avg:layers.0.weight`` and ``lr:0``; see ``capture.initial_state``."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
        self.optimizer = optimizer
        self.tensors = dict(tensors)
        named = dict(model.named_parameters())
        self._places = []
        for full, tensor in self.tensors.items():
            key, _, name = full.partition(":")
            if name in named:
                self._places.append((named[name], key, tensor))
        self._adopt()

    def refresh(self) -> None:
        """Take over what has changed since the last step: learning rates, and state that ``load_state_dict`` has put in place."""
        for index, group in enumerate(self.optimizer.param_groups):
            self.tensors[f"lr:{index}"].fill_(float(group["lr"]))
        self._adopt()

    def _adopt(self) -> None:
        with torch.no_grad():
            for parameter, key, tensor in self._places:
                state = self.optimizer.state[parameter]
                found = state.get(key)
                if found is tensor:
                    continue
                if isinstance(found, Tensor):
                    tensor.copy_(found)
                state[key] = tensor
