"""What a decoding did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class DecodeReport:
    """sweeps: calls of the model after the prompt; tokens: new ones over all rows; row_sweeps: rows summed over sweeps, which is
    how many calls one token at a time would count as; near_ties: tokens decided by less than the rounding of the model's kernels,
    and so decided as one-token decoding does; rounding: difference of the logits between a window and one token at a time, as
    measured; windows: sizes used; expected: tokens that ``window="auto"`` had predicted of its sweeps, to be held against
    ``tokens``; seconds: wall time, of which prompt_seconds for the prompt.
    """

    sweeps: int = 0
    tokens: int = 0
    row_sweeps: int = 0
    near_ties: int = 0
    rounding: float = 0.0
    windows: Counter[int] = field(default_factory=Counter)
    expected: float = 0.0
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


@dataclass
class SampleReport:
    """sweeps: evaluations made, where place by place makes ``places``; windows: their number; window: places in each; residual:
    largest change of a value in the last sweep of a window; exactness: what is guaranteed; evaluated: how the network was evaluated
    and, where not sliced, why; seconds: wall time; predicted: seconds that earlier calls of this window and as many rows let
    expect, None at the first; measured: what it took on the same clock (CPU time where one thread does all the work).
    """

    places: int
    window: int
    exactness: str
    evaluated: str
    sweeps: int = 0
    windows: int = 0
    residual: float = 0.0
    seconds: float = 0.0
    predicted: float | None = None
    measured: float = 0.0

    @property
    def accepted(self) -> float:
        """Places settled per sweep; 1 is what place by place gives."""
        return self.places / self.sweeps if self.sweeps else 0.0

    def __str__(self) -> str:
        return (
            f"{self.places} places in {self.sweeps} sweeps over {self.windows} windows of {self.window}, {self.seconds:.3f} s"
            f"{'' if self.predicted is None else f' ({self.measured:.3f} s measured, {self.predicted:.3f} s predicted)'}; "
            f"{self.exactness}; {self.evaluated}"
        )
