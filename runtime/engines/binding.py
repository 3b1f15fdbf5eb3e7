"""A tensor of the user that a program reads, and updates, at every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import InputError
from ..memory import SharedArena
from ..program import PortSpec


@dataclass(eq=False)
class Binding:
    """user: the caller's tensor; shared: the tensor in shared memory that ranks see. On the CPU both have the same memory.

    epoch: grows whenever a CUDA tensor's value was copied anew.
    """

    port: PortSpec
    user: torch.Tensor
    shared: torch.Tensor
    address: int
    version: int = -1
    epoch: int = 0

    @classmethod
    def attach(cls, bound: Sequence[tuple[PortSpec, torch.Tensor]], arena: SharedArena) -> list[Binding]:
        """Move CPU tensors into shared memory in place; give CUDA tensors a copy there."""
        shadows = [value.detach().cpu() if value.is_cuda else value for _, value in bound]
        arena.share(shadows)
        return [cls(port, user, shadow.detach(), shadow.data_ptr()) for (port, user), shadow in zip(bound, shadows, strict=True)]

    def refresh(self) -> None:
        """Make ranks see the present value. InputError when the tensor has become another kind of tensor.

        Costs a pointer comparison on the CPU. Where user code gave the tensor other memory (``p.data = ...``, ``assign=True``), the
        value is copied back into shared memory and the tensor pointed at it again.
        """
        user = self.user
        if user.is_cuda:
            if user._version != self.version:
                self.shared.copy_(user.detach())
                self.version = user._version
                self.epoch += 1
        elif user.data_ptr() != self.address:
            if user.shape != self.shared.shape or user.dtype != self.shared.dtype or user.device.type != "cpu":
                raise InputError(
                    f"{self.port} was {self.port.dtype}{list(self.port.shape)} on cpu when the program was loaded, and is now "
                    f"{str(user.dtype).removeprefix('torch.')}{list(user.shape)} on {user.device}"
                )
            with torch.no_grad():
                self.shared.copy_(user)
                user.data = self.shared

    def publish(self) -> None:
        """Give the caller's tensor the value that ranks have written."""
        with torch.no_grad():
            if self.user.is_cuda:
                self.user.copy_(self.shared)
                self.version = self.user._version
            else:
                torch.autograd.graph.increment_version(self.user)
