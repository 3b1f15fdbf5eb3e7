"""The optimizer's state while ranks update it: the very tensors that the optimizer holds, so that its ``state_dict`` is true."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def settings_of(optimizer: Optimizer) -> tuple[dict[tuple[int, str], Any], list[list[int]]]:
    """What a compiled step holds as constants, by (group, name), and which parameters are in which group."""
    groups = optimizer.param_groups
    settings = {
        (i, key): group[key] for i, group in enumerate(groups) for key in optimizer.defaults if key != "lr" and key in group
    }
    return settings, [[id(parameter) for parameter in group["params"]] for group in groups]


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
                self._places.append((named[name], key, tensor, name))
        self._adopt()

    def refresh(self) -> None:
        """Take over what has changed since the last step: learning rates, and state that ``load_state_dict`` has put in place."""
        for index, group in enumerate(self.optimizer.param_groups):
            self.tensors[f"lr:{index}"].fill_(float(group["lr"]))
        self._adopt()

    def leave_out(self, parameters: Collection[str]) -> None:
        """Give up the state of parameters that are not kept here."""
        for parameter, _, _, name in self._places if parameters else ():
            if name in parameters:
                self.optimizer.state.pop(parameter, None)
        self._places = [place for place in self._places if place[3] not in parameters]
        for full in [full for full in self.tensors if full.partition(":")[2] in parameters]:
            del self.tensors[full]

    def _adopt(self) -> None:
        with torch.no_grad():
            for parameter, key, tensor, _ in self._places:
                state = self.optimizer.state[parameter]
                found = state.get(key)
                if found is tensor:
                    continue
                if isinstance(found, Tensor):
                    tensor.copy_(found)
                state[key] = tensor
