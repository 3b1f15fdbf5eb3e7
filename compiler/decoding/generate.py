"""``hocket.generate``: the tokens of ordinary decoding, several from one call of the model.

    y[t] = choose(lm(y[<t]), noise[t])      t = 1..N      solved by Jacobi sweeps over a window that moves with the settled prefix

A sweep feeds the last settled token and n - 1 guesses. Its first result is exact; result i is exact if guesses 1..i were. Settled
tokens are therefore those of one-token decoding, whatever was guessed; only logits closer than the kernels round can tell the two
apart, and those are decided by a one-token call. (Song et al., ICML 2021, section 4.3; Santilli et al., ACL 2023, algorithm 3.)
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn

from ..errors import InputError
from .choice import Choice, Chosen, choice_for
from .drafts import Draft, new_draft
from .lm import CachedLM
from .probe import probed
from .report import DecodeReport
from .window import Window, clock, learned_window, window_for

CAUTION = 16.0  # a margin below so many times the measured rounding is a near tie


class Generated(NamedTuple):
    """ids: int64 ``[rows, prompt + new]``, or ``[prompt + new]`` for a prompt without rows; a row that stopped is filled up with
    its stop token. report: what it took.
    """

    ids: Tensor
    report: DecodeReport


@dataclass
class Sequence:
    """One row: all its settled tokens, and the unsettled results of the last sweep. cautious: the next token is a near tie."""

    row: int
    tokens: list[int]
    end: int
    draft: Draft
    trajectory: list[int] = field(default_factory=list)
    cautious: bool = False
    stopped: bool = False

    @property
    def is_done(self) -> bool:
        """Whether it has all its tokens."""
        return self.stopped or len(self.tokens) >= self.end


@torch.no_grad()
def generate(
    lm: nn.Module,
    prompt: Tensor,
    max_new_tokens: int = 256,
    *,
    window: int | str = "auto",
    draft: str | Draft = "past",
    temperature: float = 0.0,
    seed: int = 0,
    noise: Tensor | None = None,
    stop: int | Iterable[int] = (),
    progress: bool = False,
) -> Generated:
    """Decode a causal language model exactly, several tokens a call.

    lm: takes ``input_ids, attention_mask, position_ids, past_key_values, use_cache`` and returns ``.logits``, as the causal models
    of ``transformers`` do; in eval mode. prompt: int64 ``[tokens]`` or ``[rows, tokens]``. window: tokens evaluated at once, 1 for
    ordinary decoding, ``"auto"`` to choose by what pays. draft: ``"past"`` (what followed the same four tokens before),
    ``"repeat"`` (plain Jacobi), an ``NGramDraft`` of a corpus, or a callable ``(context, trajectory, count, noise) -> tokens``.
    temperature: 0 is greedy; otherwise tokens are drawn with Gumbel noise, from ``seed``, or given as ``noise`` ``[rows,
    max_new_tokens, vocabulary]``. stop: token or tokens after which a row ends. progress: draw a bar.

    Returns ``(ids, report)``. The tokens are those of one-token decoding with the same noise, for every window and draft. Raises
    InputError for a model or arguments that this cannot hold for.
    """
    rows = _rows(prompt, max_new_tokens)
    size = (
        learned_window(lm, (len(rows), temperature, draft if isinstance(draft, str) else id(draft)))
        if window == "auto"
        else window_for(window)
    )
    choose = choice_for(temperature, seed, noise, (len(rows), max_new_tokens))
    limit = rows.shape[1] + max_new_tokens
    start = time.perf_counter()
    probe = probed(lm, rows)
    report = DecodeReport(rounding=probe.rounding)
    decoder = CachedLM(lm, len(rows), limit)
    if rows.shape[1] > 1:
        decoder.logits(rows[:, :-1].to(decoder.device), keep=1)
        decoder.cache.commit([rows.shape[1] - 1] * len(rows))
    report.prompt_seconds = time.perf_counter() - start
    sequences = [Sequence(i, tokens, limit, new_draft(draft)) for i, tokens in enumerate(rows.tolist())]
    loop = _Loop(
        decoder, choose, size, report, frozenset([stop] if isinstance(stop, int) else stop), rows.shape[1], probe.vocabulary
    )
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("decoding", total=len(rows) * max_new_tokens)
        alive = sequences
        while alive:
            before = report.tokens
            loop.sweep(alive)
            bar.advance(task, report.tokens - before)
            alive = loop.unfinished(alive)
    report.seconds = time.perf_counter() - start
    filled = [s.tokens + [s.tokens[-1]] * (limit - len(s.tokens)) for s in sequences]
    ids = torch.tensor(filled, device=prompt.device)
    return Generated(ids if prompt.dim() == 2 else ids[0], report)


@dataclass
class _Loop:
    decoder: CachedLM
    choose: Choice
    window: Window
    report: DecodeReport
    stops: frozenset[int]
    prompt: int
    vocabulary: int

    def sweep(self, sequences: list[Sequence]) -> None:
        """Evaluate a window of every sequence and settle what is right of it."""
        start = clock()
        is_single = any(s.cautious for s in sequences)
        left = max(s.end - len(s.tokens) for s in sequences)
        wanted = 1 if is_single else self.window.next_size()
        count = min(wanted, left)
        guesses = [self._guess(s, count - 1) if count > 1 else [] for s in sequences]
        fed = [[s.tokens[-1], *guess] for s, guess in zip(sequences, guesses, strict=True)]
        logits = self.decoder.logits(torch.tensor(fed, device=self.decoder.device))
        chosen = self.choose(logits, [s.row for s in sequences], [len(s.tokens) - self.prompt for s in sequences])
        settled, right = self._settle(sequences, guesses, chosen, count)
        self.decoder.cache.commit(settled)
        self.report.sweeps += 1
        self.report.row_sweeps += len(sequences)
        self.report.windows[count] += 1
        self.report.expected += self.window.expected(count) * len(sequences)
        if not is_single and count == wanted:
            self.window.observe(count, right, clock() - start)

    def _guess(self, s: Sequence, count: int) -> list[int]:
        noise = self.choose.noise(s.row, len(s.tokens) - self.prompt, count, self.vocabulary)
        return s.draft(s.tokens, s.trajectory, count, noise)

    def _settle(
        self, sequences: list[Sequence], guesses: list[list[int]], chosen: Chosen, count: int
    ) -> tuple[list[int], list[int]]:
        """Per sequence: tokens settled, and guesses that were right."""
        near = (chosen.margins <= CAUTION * self.report.rounding).tolist()
        settled, right = [], []
        for s, guess, results, ties in zip(sequences, guesses, chosen.tokens.tolist(), near, strict=True):
            hits = next((i for i, token in enumerate(guess) if token != results[i]), len(guess))
            taken = hits + 1
            s.cautious = False
            if count > 1 and True in ties[:taken]:
                taken = ties.index(True)
                s.cautious = True
                self.report.near_ties += 1
            taken = min(taken, s.end - len(s.tokens))
            new = results[:taken]
            ended = next((i for i, token in enumerate(new) if token in self.stops), None)
            if ended is not None:
                new, s.stopped = new[: ended + 1], True
            s.tokens += new
            s.trajectory = results[len(new) :]
            self.report.tokens += len(new)
            settled.append(len(new))
            right.append(hits)
        return settled, right

    def unfinished(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those that go on; the cache forgets the others."""
        going = [i for i, s in enumerate(sequences) if not s.is_done]
        if going and len(going) < len(sequences):
            self.decoder.cache.keep_rows(going)
        return [sequences[i] for i in going]


def _rows(prompt: object, new: int) -> Tensor:
    if not isinstance(prompt, Tensor) or prompt.dim() not in (1, 2) or prompt.is_floating_point() or prompt.dtype is torch.bool:
        found = f"{prompt.dtype} {list(prompt.shape)}" if isinstance(prompt, Tensor) else type(prompt).__name__
        raise InputError(f"prompt must be integer tokens [tokens] or [rows, tokens]; found {found}")
    if prompt.numel() == 0:
        raise InputError("prompt is empty; it needs a token to start from in every row")
    if new < 1:
        raise InputError(f"max_new_tokens must be at least 1; found {new}")
    return prompt.reshape(-1, prompt.shape[-1]).long()
