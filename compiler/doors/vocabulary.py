"""The tactic behind ``tactics=[..., VocabularyParallel("tp")]``: logits stay cut over the vocabulary, and so does a tied table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...passes.split_embedding import SplitEmbedding
from ...passes.split_softmax import SplitSoftmax
from ..contract import Pass
from ..plan.tactics import RewriteTactic


@dataclass(frozen=True)
class VocabularyParallel(RewriteTactic):
    """Write cross entropy, and look-ups in a table that the head shares, so that an axis can cut them over the vocabulary.

    Without it the loss needs all logits of a token on one rank: they are gathered, or the head is computed by every rank. With it
    ranks exchange three numbers a token. It pays where the vocabulary is large; what stays uncut costs some passes over the logits
    more than torch's fused kernels. axis: the mesh axis, usually that of ``TensorParallel``; least: of classes, for a log-softmax
    to be written out. A shared table must have a number of rows that the axis divides; ``explain()`` says so where it has not.
    """

    in_pipelines: ClassVar[bool] = True
    axis: str
    least: int = 2

    def rewrites_before(self) -> tuple[Pass, ...]:
        """The loss, then the look-ups."""
        return (SplitSoftmax(self.axis, self.least), SplitEmbedding(self.axis))
