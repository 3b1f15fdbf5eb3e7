"""Public models, tiny: those of transformers and torch.nn as they are, and four vision models written in the public manner."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from zoo_case import Call
from zoo_vision import DenseNet, DiffusionTransformer, MlpMixer, ResNet18

TINY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**TINY, "vocab_size": 64}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _hf(kind: str, head: str, **settings: Any) -> nn.Module:
    import transformers

    return getattr(transformers, kind + head)(getattr(transformers, kind + "Config")(**settings)).train()


def tokens(length: int = 8) -> torch.Tensor:
    """Two rows of token numbers."""
    return torch.randint(0, 64, (2, length))


def llama() -> Call:
    ids = tokens()
    return _hf("Llama", "ForCausalLM", **TEXT, num_key_value_heads=2, use_cache=False), (ids,), {"labels": ids}


def gpt2() -> Call:
    calm = {"attn_pdrop": 0, "resid_pdrop": 0, "embd_pdrop": 0}
    model = _hf("GPT2", "LMHeadModel", n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=32, use_cache=False, **calm)
    return model, (tokens(),), {}


def bert() -> Call:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return _hf("Bert", "ForMaskedLM", **TEXT, **CALM), (ids,), {"attention_mask": mask}


def t5() -> Call:
    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 64}
    model = _hf("T5", "ForConditionalGeneration", **sizes, dropout_rate=0.0, use_cache=False, decoder_start_token_id=0)
    return model, (), {"input_ids": tokens(), "labels": tokens(6)}


def mixtral(experts: str = "batched_mm") -> Call:
    settings = {"num_key_value_heads": 2, "num_local_experts": 4, "use_cache": False, "experts_implementation": experts}
    return _hf("Mixtral", "ForCausalLM", **TEXT, **settings), (tokens(),), {}


def mamba() -> Call:
    model = _hf("Mamba", "ForCausalLM", num_hidden_layers=2, hidden_size=32, state_size=8, vocab_size=64, use_cache=False)
    return model, (tokens(),), {}


def wav2vec2() -> Call:
    sizes = {"conv_dim": (32, 32), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}
    sizes |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    names = ("layerdrop", "feat_proj_dropout", "hidden_dropout", "attention_dropout", "activation_dropout", "final_dropout")
    model = _hf("Wav2Vec2", "ForCTC", **TEXT, **sizes, **dict.fromkeys(names, 0.0), mask_time_prob=0.0)
    model.freeze_feature_encoder()
    return model, (torch.randn(2, 400),), {}


def vit() -> Call:
    return _hf("ViT", "ForImageClassification", **TINY, **CALM, image_size=16, patch_size=4), (torch.randn(2, 3, 16, 16),), {}


def dit() -> Call:
    model = DiffusionTransformer(size=8, channels=4, width=32, heads=4, depth=2, classes=10)
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 7])), {}


def resnet18() -> Call:
    return ResNet18(width=8, classes=10), (torch.randn(4, 3, 32, 32),), {}


def densenet() -> Call:
    return DenseNet(growth=8, blocks=(3, 4, 3), start=16, classes=10), (torch.randn(4, 3, 32, 32),), {}


def mlp_mixer() -> Call:
    return MlpMixer(size=16, patch=4, width=32, tokens=16, channels=64, depth=2, classes=10), (torch.randn(2, 3, 16, 16),), {}


def transformer() -> Call:
    model = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    return model, (torch.randn(2, 8, 32), torch.randn(2, 6, 32)), {"tgt_mask": causal, "tgt_is_causal": True}


PUBLIC = (llama, gpt2, bert, t5, mixtral, mamba, wav2vec2, vit, dit, resnet18, densenet, mlp_mixer, transformer)
