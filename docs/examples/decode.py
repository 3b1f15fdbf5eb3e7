"""Decode a small language model by windows: the tokens of one-token decoding, in fewer calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hocket

torch.manual_seed(0)
torch.set_num_threads(1)
PATTERN = torch.tensor([*b"to be, or not to be, that is the question: "])
config = LlamaConfig(
    vocab_size=128, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
)
lm = LlamaForCausalLM(config)


def train(model: nn.Module, text: Tensor, steps: int) -> None:
    """Teach it the line."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        starts = torch.randint(len(text) - 97, (8,)).tolist()
        windows = torch.stack([text[start : start + 97] for start in starts])
        loss = nn.functional.cross_entropy(model(input_ids=windows[:, :-1]).logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


text = PATTERN.repeat(8)
train(lm, text, steps=120)
lm.eval()
prompt = PATTERN[:10]

ids, report = hocket.generate(lm, prompt, max_new_tokens=60, window=8)
alone, single = hocket.generate(lm, prompt, max_new_tokens=60, window=1)
print(repr(bytes(ids.tolist()).decode()))
print("by windows:     ", report)
print("one at a time:  ", single)
print("the same tokens:", torch.equal(ids, alone))

drawn, report = hocket.generate(lm, prompt, max_new_tokens=60, temperature=0.8, seed=1, draft=hocket.NGramDraft(text))
alone, _ = hocket.generate(lm, prompt, max_new_tokens=60, temperature=0.8, seed=1, window=1)
print(
    "drawn at temperature 0.8, drafts from n-grams:", f"{report.accepted:.1f} tokens a sweep, the same: {torch.equal(drawn, alone)}"
)
