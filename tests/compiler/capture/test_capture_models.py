"""Unmodified public models, tiny: loss or outputs and every gradient equal eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_reference import assert_like_eager
from torch import nn

transformers = pytest.importorskip("transformers")

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    t, ids = transformers, torch.randint(0, 64, (2, 16))
    match name:
        case "llama":
            config = t.LlamaConfig(**TINY, num_key_value_heads=2, use_cache=False)
            return t.LlamaForCausalLM(config), (ids,), {"labels": ids}
        case "gpt2":
            config = t.GPT2Config(
                n_layer=2, n_embd=32, n_head=2, vocab_size=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, use_cache=False
            )
            return t.GPT2LMHeadModel(config), (ids,), {}
        case "bert":
            return t.BertForMaskedLM(t.BertConfig(**TINY, **CALM)), (ids,), {"attention_mask": torch.ones_like(ids)}
        case "vit":
            size = {k: v for k, v in TINY.items() if k != "vocab_size"}
            return (
                t.ViTForImageClassification(t.ViTConfig(**size, **CALM, image_size=16, patch_size=4)),
                (torch.randn(2, 3, 16, 16),),
                {},
            )
        case "t5":
            config = t.T5Config(
                num_layers=2, d_model=32, num_heads=4, d_kv=8, d_ff=64, vocab_size=64, dropout_rate=0.0, use_cache=False
            )
            config.decoder_start_token_id = 0
            return t.T5ForConditionalGeneration(config), (), {"input_ids": ids, "labels": ids}
        case "mixtral":
            config = t.MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4, use_cache=False)
            return t.MixtralForCausalLM(config), (ids,), {}
        case "mamba":
            config = t.MambaConfig(num_hidden_layers=2, hidden_size=32, state_size=8, vocab_size=64, use_cache=False)
            return t.MambaForCausalLM(config), (ids,), {}
        case "wav2vec2":
            size = {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
            size |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "feat_proj_dropout": 0.0}
            calm = {
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
                "activation_dropout": 0.0,
                "final_dropout": 0.0,
                "mask_time_prob": 0.0,
            }
            model = t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**TINY, **size, **calm))
            model.freeze_feature_encoder()
            return model, (torch.randn(2, 400),), {}
        case "nn.Transformer":
            return (
                nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True),
                (torch.randn(2, 6, 32), torch.randn(2, 5, 32)),
                {},
            )
    raise AssertionError(name)


QUICK = ("llama", "gpt2", "bert")
SLOW = ("vit", "t5", "mixtral", "mamba", "wav2vec2", "nn.Transformer")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_public_model_trains_as_in_eager(name: str) -> None:
    torch.manual_seed(0)
    model, args, kwargs = build(name)
    program = assert_like_eager(model.train(), args, kwargs, 2e-5 if name == "mamba" else 1e-5)
    reason = next(decision.reason for decision in program.decisions if decision.by == "capture")
    # grouped_mm runs in float32, but torch's shape rule for it insists on bfloat16; under torch.export Mixtral avoids it
    assert reason.startswith("traced with torch.export; make_fx failed" if name == "mixtral" else "traced with make_fx")
