"""A mixture of experts by hand: tokens and experts lie on the same ranks, which see all tokens and compute their own experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .llama import EPS, cross_entropy, linear
from .ranks import Handwritten, Ranks, Tensors, as_leaves, g, gathered, scattered, with_gradients

BUGS = {
    "auxiliary loss from local means": "the balance of experts is judged on a rank's own tokens",
    "z-loss divided twice": "the router's z-loss is divided by the number of ranks again",
    "top-k not renormalised": "the chosen experts' weights do not add up to one",
    "expert offset": "every rank applies the weights of its neighbour's experts",
    "router gradient not reduced": "the router keeps a rank's own gradient",
    "expert gradient divided": "gradients of experts are divided by the number of ranks",
}
CHOSEN = 2
AUXILIARY, ROUTER = 1e-2, 1e-3


def _shapes(rows: int, width: int, inner: int, experts: int, words: int) -> dict[str, tuple[int, ...]]:
    return {
        "input:ids": (rows,),
        "input:targets": (rows,),
        "param:embed.weight": (words, width),
        "param:norm.weight": (width,),
        "param:norm.bias": (width,),
        "param:router.weight": (experts, width),
        "param:up": (experts, width, inner),
        "param:up_bias": (experts, inner),
        "param:down": (experts, inner, width),
        "param:head.weight": (words, width),
        "param:head.bias": (words,),
    }


def _routed(p: Tensors, *, renormalise: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(embedding, normed, router logits, weight of every expert, whether it is chosen)."""
    x = F.embedding(p["input:ids"], p["param:embed.weight"])
    h = F.layer_norm(x, x.shape[-1:], p["param:norm.weight"], p["param:norm.bias"], EPS)
    logits = h @ p["param:router.weight"].t()
    weight, index = logits.softmax(-1).topk(CHOSEN, -1)
    weight = weight / weight.sum(-1, keepdim=True) if renormalise else weight
    chosen = torch.zeros_like(logits).scatter(1, index, torch.ones_like(weight))
    return x, h, logits, torch.zeros_like(logits).scatter(1, index, weight), chosen


def _experts(p: Tensors, h: Tensor, weights: Tensor) -> Tensor:
    inner = F.gelu(torch.einsum("td,edf->etf", h, p["param:up"]) + p["param:up_bias"][:, None], approximate="tanh")
    return (torch.einsum("etf,efd->etd", inner, p["param:down"]) * weights.t()[..., None]).sum(0)


def _token_losses(p: Tensors, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return cross_entropy(linear(p, "param:head", x), p["input:targets"]), logits.logsumexp(-1).square().sum()


def reference(tensors: Tensors) -> Tensors:
    """All tokens and experts in one process."""
    p = as_leaves(tensors)
    x, h, logits, weights, chosen = _routed(p)
    entropy, z = _token_losses(p, x + _experts(p, h, weights), logits)
    rows, experts = logits.shape
    balance = (chosen.sum(0) / rows * (logits.softmax(-1).sum(0) / rows)).sum() * experts
    loss = entropy / rows + AUXILIARY * balance + ROUTER * z / rows
    return {"output:loss": loss.detach(), **with_gradients(loss, p)}


def _balance(here: Ranks, logits: Tensor, chosen: Tensor) -> Tensor:
    rows, experts = logits.shape
    share = logits.softmax(-1).sum(0)
    if here.has("auxiliary loss from local means"):
        return (chosen.sum(0) / rows * (share / rows)).sum() * experts / here.size
    rows *= here.size
    return (here.sum(chosen.sum(0)) / rows * (g(here, share) / rows)).sum() * experts


def step(here: Ranks, tensors: Tensors) -> Tensors:
    """The step of one rank."""
    p = as_leaves(tensors)
    x, h, logits, weights, chosen = _routed(p, renormalise=not here.has("top-k not renormalised"))
    own = p["param:up"].shape[0]
    first = ((here.rank + 1) % here.size if here.has("expert offset") else here.rank) * own
    mixed = scattered(here, _experts(p, gathered(here, h), gathered(here, weights).narrow(1, first, own)))
    rows = logits.shape[0] * here.size
    entropy, z = _token_losses(p, x + mixed, logits)
    z = z / here.size if here.has("z-loss divided twice") else z
    tokens, balance = entropy / rows + ROUTER * z / rows, AUXILIARY * _balance(here, logits, chosen)
    local = here.has("auxiliary loss from local means")
    reported = here.sum((tokens + balance).detach()) if local else here.sum(tokens.detach()) + balance.detach()
    results = {"output:loss": reported}
    for name, gradient in with_gradients(tokens + balance, p).items():
        of_expert = name.split(":")[1] in ("up", "up_bias", "down")
        if of_expert:
            results[name] = gradient / here.size if here.has("expert gradient divided") else gradient
        else:
            forgotten = here.has("router gradient not reduced") and name == "gradient:router.weight"
            results[name] = gradient if forgotten else here.sum(gradient)
    return results


def experts(rows: int = 8, width: int = 6, inner: int = 5, count: int = 4, words: int = 7) -> Handwritten:
    """The program with its bugs."""
    cut = {"input:ids": "S(0)", "input:targets": "S(0)"}
    for name in ("up", "up_bias", "down"):
        cut |= {f"param:{name}": "S(0)", f"gradient:{name}": "S(0)"}
    integers = {"input:ids": words, "input:targets": words}
    return Handwritten("experts", _shapes(rows, width, inner, count, words), reference, step, BUGS, integers, cut)
