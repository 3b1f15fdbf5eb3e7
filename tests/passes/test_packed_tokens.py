"""Packed tokens: the same results at valid tokens, fewer rows, and a clear word where it cannot be or does not pay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from split_support import context, held_by, run
from torch import Tensor, nn

from hocket.compiler.capture import capture
from hocket.compiler.doors.packed_inference import PackedInference, Packing, packed_program
from hocket.compiler.errors import VerificationError
from hocket.compiler.program import Program, RoleKind, check_program
from hocket.errors import InputError
from hocket.passes.packed_tokens import PackedTokens

aten = torch.ops.aten
ROWS, LENGTH, WIDTH = 3, 6, 16
MASK = "kwargs['mask']"


class Encoder(nn.Module):
    """Embedding with positions, one block of attention and feed-forward. pooled: also give the mean over positions."""

    def __init__(self, *, masked: bool = True, pooled: bool = False) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(20, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.masked, self.pooled = masked, pooled

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[rows, positions] -> [rows, positions, width], or [rows, width]."""
        x = self.embedding(tokens) + self.positions
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        seen = (mask != 0)[:, None, None, :] if self.masked else None
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return x.mean(1) if self.pooled else x


def batch(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 20, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    return tokens, (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder().eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def program(encoder: Encoder) -> Program:
    tokens, mask = batch([4, 2, 5])
    return capture(encoder, (tokens,), {"mask": mask})


def results(program: Program, model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    names = {"args[0]": tokens, MASK: mask}
    given = held_by(program, model) | {role: names[role.name] for role in program.signature.inputs if role.kind is RoleKind.INPUT}
    (found,) = run(program, given).values()
    return found


def test_linear_layers_norms_and_activations_run_on_the_capacity_and_attention_on_the_batch(program: Program) -> None:
    packed = PackedTokens(MASK, 7, least_gain=-1e9)(program, context())
    check_program(packed)
    products = [node for node in packed.nodes if node.target is aten.addmm.default]
    (activation,) = (node for node in packed.nodes if node.target is aten.gelu.default)
    assert [node.meta["val"].shape[0] for node in (*products, activation)] == [7] * 5
    norms = [node for node in packed.nodes if node.target is aten.native_layer_norm.default]
    assert [node.meta["val"][0].shape[0] for node in norms] == [7, 7]
    (attention,) = (node for node in packed.nodes if "scaled_dot_product" in str(node.target))
    assert attention.meta["val"][0].shape == (ROWS, 2, LENGTH, 8)
    (decision,) = packed.decisions[len(program.decisions) :]
    assert decision.applied
    assert "7 of 18 tokens (39%)" in decision.reason


def test_packing_that_saves_nothing_is_left_out_and_says_so(program: Program) -> None:
    whole = PackedTokens(MASK, ROWS * LENGTH)(program, context())
    (decision,) = whole.decisions[len(program.decisions) :]
    assert not decision.applied
    assert "less than 3% to gain" in decision.reason
    assert all(node.target is not aten.index_select.default for node in whole.nodes)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, LENGTH), min_size=ROWS, max_size=ROWS), spare=st.integers(0, 3), seed=st.integers(0, 99))
def test_results_are_the_model_s_at_valid_tokens_and_zero_at_padding(
    program: Program, encoder: Encoder, lengths: list[int], spare: int, seed: int
) -> None:
    tokens, mask = batch(lengths, seed)
    capacity = min(sum(lengths) + spare, ROWS * LENGTH)
    packed = PackedTokens(MASK, capacity, least_gain=-1e9)(program, context())
    found, expected = results(packed, encoder, tokens, mask), encoder(tokens, mask)
    torch.testing.assert_close(found[mask != 0], expected[mask != 0], rtol=1e-5, atol=1e-6)
    assert not found[mask == 0].any()


@pytest.mark.parametrize(
    ("mask", "capacity", "words"),
    [
        ("nothing", 4, r"found no 'nothing' among"),
        (MASK, 0, "between 1 and the 18 tokens"),
        (MASK, 19, "between 1 and the 18 tokens"),
    ],
)
def test_what_cannot_be_is_said(program: Program, mask: str, capacity: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        PackedTokens(mask, capacity)(program, context())


def test_a_step_with_a_backward_is_refused() -> None:
    tokens, mask = batch([4, 2, 5])
    with pytest.raises(InputError, match="packed tokens are for inference"):
        PackedTokens(MASK, 6)(capture(Encoder(), (tokens,), {"mask": mask}), context())


@pytest.mark.parametrize("model", [Encoder(masked=False), Encoder(pooled=True)], ids=["attention to padding", "mean over padding"])
def test_a_model_whose_results_depend_on_padding_is_not_served(model: Encoder) -> None:
    tokens, mask = batch([4, 2, 5])
    program = capture(model.eval().requires_grad_(requires_grad=False), (tokens,), {"mask": mask})
    with pytest.raises(VerificationError, match="do its results depend on what stands in the padding"):
        packed_program(program, PackedTokens(MASK, 6, least_gain=-1e9), context())


def test_requests_go_through_the_smallest_program_that_holds_them(encoder: Encoder) -> None:
    tokens, mask = batch([4, 2, 5])
    calls = [batch(lengths, seed) for seed, lengths in enumerate(([1, 1, 1], [6, 6, 6], [3, 2, 4], [6, 1, 6]))]
    with PackedInference(encoder, (tokens,), {"mask": mask}, Packing("mask", (0.25, 0.5), least_gain=-1e9)) as served:
        assert [one.capacity for one in served.programs] == [4, 9, 18]
        assert [one.applied for one in served.programs] == [True] * 3
        assert len(served.decisions) == 3
        pending = [served.submit(t, mask=m) for t, m in calls]
        for (t, m), result in zip(calls, pending, strict=True):
            found = result.result(60)
            torch.testing.assert_close(found[m != 0], encoder(t, m)[m != 0], rtol=1e-5, atol=1e-6)
        with pytest.raises(InputError, match="expected a call like the example"):
            served.submit(tokens, mask, 3)
    with pytest.raises(InputError, match=r"one of the keyword arguments \['mask'\]; found 'other'"):
        PackedInference(encoder, (tokens,), {"mask": mask}, Packing("other"))
    with pytest.raises(InputError, match="between 0 and 1"):
        Packing("mask", (0.5, 1.5))
