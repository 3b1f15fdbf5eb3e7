"""Decoding by windows gives the tokens of one-token decoding, for every model, window, draft and noise; and says when it can't."""

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import hocket
from hocket.compiler.decoding.drafts import NGramDraft
from hocket.compiler.decoding.window import learned_window
from hocket.errors import InputError

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GPT2 = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
OPT = OPTConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=48,
    max_position_embeddings=64,
    word_embed_proj_dim=32,
)
GEMMA = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=5, layer_types=["sliding_attention", "full_attention"])
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama, eager attention": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "gemma3, two kinds of layers": lambda: Gemma3ForCausalLM(GEMMA),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(GPT2),
    "opt": lambda: OPTForCausalLM(OPT),
}


@functools.cache
def model(name: str) -> nn.Module:
    """Random weights large enough that the text is not one token for ever."""
    generator = torch.Generator().manual_seed(7)
    made: nn.Module = MAKERS[name]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3, generator=generator)
    return made


def prompts(rows: int = 3, tokens: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(4, 40, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", MAKERS)
def test_the_tokens_are_those_of_the_models_own_generate(name: str) -> None:
    lm = model(name)
    expected = lm.generate(prompts(), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)  # type: ignore[operator]
    for window in (1, 6, "auto"):
        found, report = hocket.generate(lm, prompts(), 30, window=window)
        assert torch.equal(found, expected), (window, str(report))
        assert report.tokens == 90


@settings(max_examples=12, deadline=None)
@given(
    window=st.integers(1, 12),
    rows=st.integers(1, 4),
    tokens=st.integers(1, 7),
    new=st.integers(1, 20),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
    draft=st.sampled_from(["past", "repeat", "wrong", "corpus"]),
)
def test_no_window_draft_or_batch_changes_a_token(
    window: int, rows: int, tokens: int, new: int, temperature: float, seed: int, draft: str
) -> None:
    lm, prompt = model("llama"), prompts(rows, tokens, seed % 100)
    own: dict[str, Any] = {
        "wrong": lambda context, _, count, __: [(context[-1] + 1) % 40] * count,
        "corpus": NGramDraft(prompts(1, 400)[0]),
    }
    guesses = own.get(draft, draft)
    found, report = hocket.generate(lm, prompt, new, window=window, draft=guesses, temperature=temperature, seed=seed)
    for row in range(rows):
        given_noise = _gumbel(seed, row, new) if temperature else None
        alone, _ = hocket.generate(lm, prompt[row], new, window=1, temperature=temperature, noise=given_noise)
        assert torch.equal(found[row], alone)
    assert report.sweeps <= rows * new + report.near_ties


def _gumbel(seed: int, row: int, count: int) -> Tensor:
    """The documented law of the noise: one generator per seed, row and position."""
    drawn = []
    for position in range(count):
        generator = torch.Generator().manual_seed(((seed * 1_000_003 + row) * 1_000_003 + position) % 2**63)
        drawn.append(-torch.empty(40).exponential_(generator=generator).log())
    return torch.stack(drawn)[None]


def test_gumbel_noise_draws_from_the_softmax() -> None:
    from hocket.compiler.decoding.choice import Sampled

    logits = torch.tensor([0.0, 1.0, 2.0])
    chosen = Sampled(temperature=0.7, seed=5)(logits.expand(1, 4000, 3), [0], [0]).tokens
    shares = torch.bincount(chosen.flatten(), minlength=3) / 4000
    torch.testing.assert_close(shares, (logits / 0.7).softmax(0), atol=0.025, rtol=0)


def test_repetition_is_settled_many_tokens_at_a_time() -> None:
    """Guesses that are right are believed: else windows would be for nothing."""
    lm, prompt = model("gemma3, two kinds of layers"), prompts()
    _, report = hocket.generate(lm, prompt, 40, window=8)
    _, single = hocket.generate(lm, prompt, 40, window=1)
    assert single.sweeps == 40
    assert report.accepted > 2 * single.accepted


class Bigrams(nn.Module):
    """A language model whose next token depends on the last one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(3 * torch.randn(40, 40, generator=torch.Generator().manual_seed(3)))

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_that_knows_the_distribution_is_mostly_right(temperature: float) -> None:
    """Drawing the guess with the model's own noise couples the two draws: the reason for sampled decoding to gain at all."""
    lm = Bigrams().eval()
    seen, _ = hocket.generate(lm, prompts(1)[0], 3000, window=1, temperature=1.0)
    _, plain = hocket.generate(lm, prompts(8), 40, window=8, draft="repeat", temperature=temperature, seed=9)
    _, coupled = hocket.generate(lm, prompts(8), 40, window=8, draft=NGramDraft(seen, 2), temperature=temperature, seed=9)
    assert coupled.accepted > 1.5 * plain.accepted
    assert coupled.accepted > 4


def test_ngrams_back_off_to_shorter_contexts() -> None:
    draft = NGramDraft(torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 4]), order=3)
    assert draft([1, 2], [], 3, None) == [3, 1, 2]
    assert draft([9, 3], [], 1, None) == [1], "an unknown context of two, a known one of one"
    loud = torch.zeros(1, 6)
    loud[0, 4] = 9.0
    assert draft([1, 2], [], 1, loud) == [4], "noise decides among what occurred"
    with pytest.raises(InputError, match="corpus of tokens"):
        NGramDraft(torch.rand(9))


def test_a_row_ends_at_its_stop_token_and_is_filled_up_with_it() -> None:
    lm, prompt = model("llama"), prompts()
    free, _ = hocket.generate(lm, prompt, 20, window=1)
    stop = int(free[0, 12])
    found, _ = hocket.generate(lm, prompt, 20, window=5, stop=stop)
    for row in range(3):
        places = (free[row, 5:] == stop).nonzero().flatten()
        end = 5 + int(places[0]) if len(places) else 24
        assert torch.equal(found[row, : end + 1], free[row, : end + 1])
        assert (found[row, end + 1 :] == stop).all()


def test_near_ties_are_decided_by_one_token_calls() -> None:
    """Two tokens with the same embedding and head tie always: only a call of the reference's shape may choose."""
    lm = MAKERS["llama"]().eval()
    with torch.no_grad():
        lm.lm_head.weight[1::2] = lm.lm_head.weight[0::2]
    alone, _ = hocket.generate(lm, prompts(1), 15, window=1)
    found, report = hocket.generate(lm, prompts(1), 15, window=6)
    assert torch.equal(found, alone)
    assert report.near_ties > 0


class Recurrent(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


class Forgetful(LlamaForCausalLM):
    """Takes the arguments and ignores the positions of its rows."""

    def forward(self, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        positions = None if position_ids is None else torch.zeros_like(position_ids)
        return super().forward(*args, position_ids=positions, **kwargs)


@pytest.mark.parametrize(
    ("lm", "prompt", "options", "message"),
    [
        (Recurrent().eval(), prompts(), {}, "takes no 'attention_mask'"),
        ("llama", prompts().float(), {}, "integer tokens"),
        ("llama", prompts()[:, :0], {}, "prompt is empty"),
        ("llama", prompts(), {"max_new_tokens": 0}, "at least 1"),
        ("llama", prompts(), {"max_new_tokens": 200}, "has positions for 64"),
        ("llama", prompts(), {"window": 0}, "from 1 up"),
        ("llama", prompts(), {"window": "wide"}, "window must be"),
        ("llama", prompts(), {"draft": "oracle"}, "draft must be"),
        ("llama", prompts(), {"temperature": -1.0}, "temperature must be"),
        ("llama", prompts(), {"noise": torch.zeros(3, 9, 40)}, "draws nothing"),
        ("llama", prompts(), {"temperature": 1.0, "noise": torch.zeros(2, 9, 40)}, "noise must be"),
        (Forgetful(LlamaConfig(**SIZES)).eval(), prompts(), {}, "other logits with a cache"),
        (LlamaForCausalLM(LlamaConfig(**SIZES)).train(), prompts(), {}, "training mode"),
    ],
)
def test_what_can_not_be_exact_is_refused_with_the_reason(lm: Any, prompt: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        hocket.generate(model(lm) if isinstance(lm, str) else lm, prompt, **{"max_new_tokens": 9, **options})


def test_auto_follows_how_far_guesses_are_right() -> None:
    from hocket.compiler.decoding.window import Window

    window = Window(None)
    for right, best in ((0, 1), (31, 32), (0, 1), (3, 4)):
        sizes = []
        for _ in range(400):
            size = window.next_size()
            window.observe(size, [min(right, size - 1)], 1.0 + 0.05 * size)
            sizes.append(size)
        assert max(set(sizes[-100:]), key=sizes[-100:].count) == best


def test_a_model_keeps_what_its_windows_have_learned() -> None:
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2).eval()
    prompt = torch.randint(0, 40, (2, 6))
    hocket.generate(lm, prompt, 40)
    same = learned_window(lm, (2, 0.0, "past"))
    assert {1, 8} <= set(same._seconds)
    assert learned_window(lm, (2, 0.0, "repeat"))._sweeps == 0
    before = same._sweeps
    ids, report = hocket.generate(lm, prompt, 40)
    assert same._sweeps > before
    assert torch.equal(ids, hocket.generate(lm, prompt, 40, window=1).ids)
    assert report.expected > 0
