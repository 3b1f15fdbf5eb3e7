"""Exact decoding of a small trained character transformer: by windows, one token at a time, and by the model's own ``generate``."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from common import Row, Sample, progress, versus
from torch import Tensor, nn

import hocket
from hocket.compiler.decoding.drafts import Draft, NGramDraft
from hocket.compiler.demo.text import batches, text_bytes

CLAIM = "exact decoding of a character transformer"
PROMPT, NEW = 64, 128
HELD_OUT = 30_000  # bytes at the end of the text, which neither the model nor the n-grams see
TRAINING = 110.0  # CPU seconds
PEERS = ("one token at a time", "the model's own generate")


def rows(*, quick: bool) -> list[Row]:
    """Tokens per CPU second on one thread, one sequence at a time, and equality over many prompts."""
    torch.set_num_threads(1)
    lm = trained(TRAINING / 10 if quick else TRAINING)
    prompts = _prompts(4 if quick else 12)
    found = []
    corpus = NGramDraft(text_bytes()[:-HELD_OUT])
    for name, temperature in (("greedy", 0.0), ("temperature 0.7", 0.7), ("temperature 1", 1.0)):
        for kind, draft in (("the text's own past", "past"), ("6-grams of the training text", corpus)):
            progress(f"decoding {len(prompts)} prompts, {name}, drafts from {kind}")
            found += _case(lm, prompts, f"{name}, drafts from {kind}", temperature, draft)
    return [*found, _equality(lm, 20 if quick else 200)]


def _case(lm: nn.Module, prompts: list[Tensor], name: str, temperature: float, draft: str | Draft) -> list[Row]:
    goal = 2.0 if temperature == 0 else 1.2
    times: dict[str, list[float]] = {"windows": [], PEERS[0]: [], PEERS[1]: []}
    accepted = []
    for seed, prompt in enumerate(prompts):
        options: dict[str, Any] = {"temperature": temperature, "seed": seed}
        start = time.process_time()
        ids, report = hocket.generate(lm, prompt, NEW, window="auto", draft=draft, **options)
        middle = time.process_time()
        alone, _ = hocket.generate(lm, prompt, NEW, window=1, **options)
        end = time.process_time()
        if not torch.equal(ids, alone):
            raise AssertionError(f"prompt {seed} decoded differently by windows ({name})")
        times["windows"].append(middle - start)
        times[PEERS[0]].append(end - middle)
        accepted.append(report.accepted)
        if temperature == 0:
            lm.generate(prompt[None], max_new_tokens=NEW, do_sample=False, pad_token_id=0)  # type: ignore[operator]
            times[PEERS[1]].append(time.process_time() - end)
    ours = Sample(tuple(times["windows"]))
    case = f"{name}, {sum(accepted) / len(accepted):.2f} tokens a sweep"
    made = [versus(CLAIM, f"{case}, against {PEERS[0]}", ours, PEERS[0], Sample(tuple(times[PEERS[0]])), goal)]
    if times[PEERS[1]]:
        made.append(versus(CLAIM, f"{case}, against {PEERS[1]}", ours, PEERS[1], Sample(tuple(times[PEERS[1]])), goal))
    return made


def _equality(lm: nn.Module, count: int) -> Row:
    """Prompts whose tokens are the same by windows and one at a time, a third of them at each temperature."""
    prompts = torch.stack(_prompts(count))
    same = 0
    for i, temperature in enumerate((0.0, 0.7, 1.0)):
        part = prompts[i::3]
        ids, _ = hocket.generate(lm, part, NEW // 2, window=8, temperature=temperature, seed=i)
        alone, _ = hocket.generate(lm, part, NEW // 2, window=1, temperature=temperature, seed=i)
        same += int((ids == alone).all(dim=1).sum())
    text, goal = f"{same} of {count}", f"all {count}"
    return Row(CLAIM, f"same tokens, {count} prompts", same, "prompts", goal=goal, met=same == count, text=text)


def _prompts(count: int) -> list[Tensor]:
    held_out = text_bytes()[-HELD_OUT:]
    step = (HELD_OUT - PROMPT) // count
    return [held_out[i * step : i * step + PROMPT] for i in range(count)]


def trained(seconds: float) -> nn.Module:
    """A Llama of 0.9 million parameters over bytes of English, trained for so many CPU seconds; kept for the next run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, intermediate_size=344
    )
    lm = LlamaForCausalLM(config)
    kept = Path(torch.hub.get_dir()) / f"hocket-char-llama-held-out-{seconds:.0f}.pt"
    if kept.exists():
        lm.load_state_dict(torch.load(kept, weights_only=True))
        return lm.eval()
    progress(f"training a character transformer for {seconds:.0f} CPU seconds")
    _train(lm, seconds)
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(lm.state_dict(), kept)
    return lm.eval()


def _train(lm: nn.Module, seconds: float) -> None:
    optimizer = torch.optim.AdamW(lm.parameters(), lr=2e-3)
    start = time.process_time()
    for step, (tokens, targets) in enumerate(batches(16, 128, text=text_bytes()[:-HELD_OUT])):
        share = (time.process_time() - start) / seconds
        if share >= 1:
            return
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * share))
        loss = nn.functional.cross_entropy(lm(input_ids=tokens).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
