"""What a decoding did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class DecodeReport:
    """sweeps: calls of the model after the prompt; tokens: new ones over all rows; row_sweeps: rows summed over sweeps, which is
    how many calls one token at a time would count as; near_ties: tokens decided by less than the rounding of the model's kernels,
    and so decided as one-token decoding does; rounding: difference of the logits between a window and one token at a time, as
    measured; windows: sizes used; seconds: wall time, of which prompt_seconds for the prompt.
    """

    sweeps: int = 0
    tokens: int = 0
    row_sweeps: int = 0
    near_ties: int = 0
    rounding: float = 0.0
    windows: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    prompt_seconds: float = 0.0

    @property
    def accepted(self) -> float:
        """Tokens settled per sweep and row; 1 is what one token at a time gives."""
        return self.tokens / self.row_sweeps if self.row_sweeps else 0.0

    def __str__(self) -> str:
        sizes = ", ".join(f"{size} ({count}x)" for size, count in self.windows.most_common(4))
        ties = f"; {self.near_ties} near ties decided one token at a time" if self.near_ties else ""
        return (
            f"{self.tokens} tokens in {self.sweeps} sweeps, {self.accepted:.2f} a sweep and sequence, {self.seconds:.2f} s; "
            f"mostly windows of {sizes}; the same tokens as one at a time up to rounding of {self.rounding:.1e} in the logits{ties}"
        )
