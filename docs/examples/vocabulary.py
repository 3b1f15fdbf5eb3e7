"""A language model whose head and embedding share a table: logits stay cut over the vocabulary, and nobody gathers them."""

import torch
import torch.nn.functional as F
from torch import nn

import hocket


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens, targets):
        x = self.table(tokens)
        x = x + self.down(F.silu(self.up(x)))
        logits = x @ self.table.weight.t()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


torch.manual_seed(0)
vocabulary = 8192
tokens, targets = torch.randint(vocabulary, (2, 8, 32))
model = LanguageModel(vocabulary, 32)
expected = model(tokens, targets).item()

for tactics in ([hocket.TensorParallel("tp")], [hocket.TensorParallel("tp"), hocket.VocabularyParallel("tp")]):
    with hocket.parallelize(model, "tp=2", (tokens, targets), tactics=tactics) as parallel:
        loss = parallel(tokens, targets)
        loss.backward()
        cost = parallel.plan.cost
    print(f"{len(tactics)} tactics: loss {loss.item():.5f} ({expected:.5f} on one device), ", end="")
    print(f"{cost.bytes_on_wire:,.0f} bytes on the wire and {cost.peak_bytes:,} held at once, per rank")
