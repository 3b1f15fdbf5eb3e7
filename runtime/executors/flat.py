"""The production executor: one rank, one loop over the instruction list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from ..communicator import Communicator
from ..load import LoadedProgram


class Monitor(Protocol):
    """Told where a rank is. Called once per instruction, so it must be cheap (0.2 us) and must not raise."""

    def at(self, index: int) -> None:
        """Instruction ``index`` starts."""
        ...

    def issue(self, index: int, fingerprint: int) -> None:
        """A collective starts; ranks of a group that agree on op, axis, shape and dtype have the same fingerprint (crc32)."""
        ...

    def wait(self, index: int) -> None:
        """The rank begins to wait for a collective's result (``at`` of the next instruction ends it)."""
        ...


class Frame:
    """The values of one run, alive between its segments."""

    def close(self) -> None:
        """Drop every value. Closing twice is harmless."""


class FlatExecutor:
    """Runs a loaded program on its rank."""

    def __init__(self, loaded: LoadedProgram, communicator: Communicator, monitor: Monitor | None = None) -> None: ...

    def open(self, inputs: Sequence[torch.Tensor | None]) -> Frame:
        """A frame with the inputs of the first segment; None for ports of later segments. Several frames may be alive."""
        raise NotImplementedError

    def run(
        self,
        frame: Frame,
        segment: str,
        extra_inputs: Sequence[torch.Tensor | None] = (),
        out: Mapping[int, torch.Tensor] | None = None,
    ) -> list[torch.Tensor | None]:
        """Run one segment of a frame.

        extra_inputs: values of the ports of a later segment (tangents), in the order of its ``inputs``. out: output port ->
        destination. Returns the local results in the order of ``segment_outputs``.
        """
        raise NotImplementedError
