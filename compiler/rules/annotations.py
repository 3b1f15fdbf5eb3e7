"""hocket's own rules as data: contractions, attention, convolutions, normalisation with statistics, losses, embeddings.

The notation is that of ``notation``; one entry may have several lines, for modes that its constants choose: the judge keeps what
holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .notation import annotated_rules
from .rule import Rule
from .signature import OpSignature

aten = torch.ops.aten

_CONV = ("n c _*, o c _*, o +c -> n o _* +c", "n c _*, c o _*, o +c -> n o _* +c")
_CONV_BACKWARD = (
    "n o _*, n c _*, o c _* -> n c _* +o, o c _* +n, o +n",
    "n o _*, n c _*, c o _* -> n c _* +o, c o _* +n, o +n",
)
_POOL = "n c _* -> n c _*, n c _*"
_POOL_BACKWARD = "n c _*, n c _* -> n c _*"
_BATCH_NORM = "_ c _*, c, c, c, c -> _ c _*, c, c, c, c"

ANNOTATIONS: Mapping[Any, tuple[str, ...]] = {
    # y[m,n] = sum_k a[m,k] b[k,n]
    aten.mm.default: ("m k, k n -> m n +k",),
    aten.bmm.default: ("b m k, b k n -> b m n +k",),
    aten.mv.default: ("m k, k -> m +k",),
    aten.dot.default: ("k, k -> +k",),
    # y = beta bias + alpha a b: the bias joins a partial sum once
    aten.addmm.default: ("m n +k, m k, k n -> m n +k", "n +k, m k, k n -> m n +k"),
    aten.baddbmm.default: ("b m n +k, b m k, b k n -> b m n +k",),
    aten.addmv.default: ("m +k, m k, k -> m +k",),
    aten.addbmm.default: ("m n +b +k, b m k, b k n -> m n +b +k",),
    # softmax(q k^T + mask) v: batches, heads and queries are independent (queries unless causal)
    aten._scaled_dot_product_flash_attention_for_cpu.default: (
        "b h q _, b h _ _, b h _ _, b h q _ -> b h q _, b h q",
        "b h q _, b h _ _, b h _ _, q _ -> b h q _, b h q",
    ),
    # dq of one query needs that query; dk and dv are sums over queries
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (
        "b h q _, b h q _, b h _ _, b h _ _, b h q _, b h q, b h q _ -> b h q _, b h _ _ +q, b h _ _ +q",
        "b h q _, b h q _, b h _ _, b h _ _, b h q _, b h q, q _ -> b h q _, b h _ _ +q, b h _ _ +q",
    ),
    aten._scaled_dot_product_flash_attention.default: ("b h _ _, b h _ _, b h _ _ -> b h _ _, b h _, , , , , _*, _*, _*",),
    aten._scaled_dot_product_flash_attention_backward.default: (
        "b h _ _, b h _ _, b h _ _, b h _ _, b h _ _, b h _, _*, _*, _*, _* -> b h _ _, b h _ _, b h _ _",
    ),
    aten._scaled_dot_product_efficient_attention.default: ("b h _ _, b h _ _, b h _ _, b h _ _ -> b h _ _, b h _, _*, _*",),
    aten._scaled_dot_product_efficient_attention_backward.default: (
        "b h _ _, b h _ _, b h _ _, b h _ _, b h _ _, b h _ _, b h _, _*, _* -> b h _ _, b h _ _, b h _ _, b h _ _",
    ),
    aten._scaled_dot_product_cudnn_attention.default: (
        "b h _ _, b h _ _, b h _ _, b h _ _ -> b h _ _, b h _*, , , , , _*, _*, _*",
    ),
    aten._scaled_dot_product_cudnn_attention_backward.default: (
        "b h _ _, b h _ _, b h _ _, b h _ _, b h _ _, b h _*, _*, _*, b h _ _, _*, _* -> b h _ _, b h _ _, b h _ _",
    ),
    # y[n,o] = sum_c w[o,c] * x[n,c] (+ bias[o]); the second line is the transposed weight
    aten.convolution.default: _CONV,
    aten.convolution_backward.default: _CONV_BACKWARD,
    # y[..., d] = W[i[...], d]
    aten.embedding.default: ("_ d, * -> * d",),
    # dW[v, d] = sum over positions that hold v
    aten.embedding_dense_backward.default: ("* d, * -> _ d +*",),
    # -log p of the target: no reduction, or a sum (a mean divides by a count over the whole batch: no line for it)
    aten.nll_loss_forward.default: ("n _, n, _ -> n, ", "n _, n, _ -> +n, +n"),
    aten.nll_loss2d_forward.default: ("n _ h w, n h w, _ -> n h w, ", "n _ h w, n h w, _ -> +n +h +w, +n +h +w"),
    # total_weight is an input here, so every reduction is independent over the batch
    aten.nll_loss_backward.default: ("n, n _, n, _, -> n _", ", n _, n, _, -> n _"),
    aten.nll_loss2d_backward.default: ("n h w, n _ h w, n h w, _, -> n _ h w", ", n _ h w, n h w, _, -> n _ h w"),
    aten.max_pool2d_with_indices.default: (_POOL,),
    aten.max_pool2d_with_indices_backward.default: ("n c _*, n c _*, n c _* -> n c _*",),
    aten.avg_pool1d.default: ("n c _* -> n c _*",),
    aten.avg_pool2d.default: ("n c _* -> n c _*",),
    aten.avg_pool3d.default: ("n c _* -> n c _*",),
    aten.avg_pool2d_backward.default: (_POOL_BACKWARD,),
    aten.adaptive_avg_pool1d.default: ("n c _* -> n c _*",),
    aten._adaptive_avg_pool2d.default: ("n c _* -> n c _*",),
    aten._adaptive_avg_pool2d_backward.default: (_POOL_BACKWARD,),
    aten._adaptive_avg_pool3d.default: ("n c _* -> n c _*",),
    aten.upsample_nearest2d.default: ("n c _* -> n c _*",),
    aten.upsample_nearest2d_backward.default: ("n c _* -> n c _*",),
    aten.upsample_bilinear2d.default: ("n c _* -> n c _*",),
    aten.upsample_bilinear2d_backward.default: ("n c _* -> n c _*",),
    # statistics over one group of channels of one sample
    aten.native_group_norm.default: ("n _*, _, _ -> n _*, n _, n _",),
    aten.native_group_norm_backward.default: ("n _*, n _*, n _, n _, _ -> n _*, _ +n, _ +n",),
    # statistics over the batch: channels are independent, the batch is not
    aten.native_batch_norm.default: ("_ c _*, c, c, c, c -> _ c _*, c, c",),
    aten._native_batch_norm_legit.default: ("_ c _*, c, c, c, c -> _ c _*, c, c",),
    aten._native_batch_norm_legit.no_stats: ("_ c _*, c, c -> _ c _*, c, c",),
    aten._native_batch_norm_legit_functional.default: (_BATCH_NORM,),
    aten.native_batch_norm_backward.default: ("_ c _*, _ c _*, c, c, c, c, c -> _ c _*, c, c",),
    aten.cudnn_batch_norm.default: ("_ c _*, c, c, c, c -> _ c _*, c, c, _*",),
    # stored statistics: independent everywhere
    aten._native_batch_norm_legit_no_training.default: ("n c *, c, c, c, c -> n c *, _*, _*",),
}


def hocket_annotations(signature: OpSignature) -> Iterator[Rule]:
    """Candidates from the table above."""
    for text in ANNOTATIONS.get(signature.target, ()):
        schema = signature.target._schema
        tensors = [argument.name for argument in schema.arguments if "Tensor" in str(argument.type)]
        yield from annotated_rules(signature, text, tensors, f"hocket:{schema.name.split('::')[1]}")
