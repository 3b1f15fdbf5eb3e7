"""A pipeline of two stages by hand: micro-batches, tied embedding, weight gradients put off to the end, two steps of SGD.

The loss is the mean over all tokens of the batch that count; micro-batches hold different numbers of them. The perceptron's
backward is written out in two parts: what the stage before waits for, and what only the optimizer needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

from .llama import Sizes, block, causal, heads, linear, merged, rms, turn
from .ranks import Handwritten, Ranks, Tensors

BUGS = {
    "stale weights": "one micro-batch of the second step still uses the weights of the first",
    "mean of means": "every micro-batch is averaged by itself, though they hold different numbers of tokens",
    "micro-batch scale missing": "gradients are summed as if every micro-batch were the batch",
    "tied gradient not reduced": "the first stage does not get the head's part of the embedding's gradient",
    "stale activation": "a weight gradient that was put off uses another micro-batch's activation",
    "weight decay on biases": "biases decay too",
    "weight decay twice": "the query's weight decays twice as fast",
}
RATE, DECAY, STEPS = 0.1, 0.01, 2
EMBED = "param:embed.weight"


def _shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    found = {name: shape for name, shape in sizes.shapes().items() if name != "param:head.weight"}
    return {
        "input:ids": found.pop("input:ids"),
        "input:targets": found.pop("input:targets"),
        **found,
        "input:valid": (sizes.batch, sizes.sequence),
    }


def _losses(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    rows = logits.flatten(0, 1)
    each = rows.logsumexp(-1) - rows.gather(1, targets.reshape(-1, 1))[:, 0]
    return torch.where(valid.reshape(-1), each, 0.0).sum()


def reference(sizes: Sizes) -> Callable[[Tensors], Tensors]:
    """The whole batch at once, in one process."""

    def step(tensors: Tensors) -> Tensors:
        held = {name: t for name, t in tensors.items() if name.startswith("param:")}
        loss = torch.zeros(())
        for _ in range(STEPS):
            p = {name: t.detach().requires_grad_() for name, t in held.items()}
            x = F.embedding(tensors["input:ids"], p[EMBED])
            for layer in range(sizes.layers):
                x = block(p, f"param:layers.{layer}.", x, sizes.heads)
            logits = rms(x, p["param:norm.weight"]) @ p[EMBED].t()
            loss = _losses(logits, tensors["input:targets"], tensors["input:valid"]) / tensors["input:valid"].sum()
            found = dict(zip(p, grad(loss, list(p.values())), strict=True))
            held = {name: _updated(name, t, found[name]) for name, t in held.items()}
        return {"output:loss": loss.detach(), **{name.replace("param:", "update:"): t for name, t in held.items()}}

    return step


def _updated(name: str, value: Tensor, gradient: Tensor, bug: str = "") -> Tensor:
    decay = DECAY if name.endswith("weight") or bug == "weight decay on biases" else 0.0
    if bug == "weight decay twice" and name.endswith("q.weight"):
        decay *= 2
    return value - RATE * (gradient + decay * value)


Later = list[tuple[str, Callable[[Tensor], tuple[Tensor, Tensor]], Tensor]]
"""(layer, weight and bias gradient from the output's gradient, the output's gradient)."""


def _weights_of(x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda g: (g.flatten(0, -2).t() @ x.flatten(0, -2), g.flatten(0, -2).sum(0))


def _perceptron(p: Tensors, at: str, h: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Later]]]:
    """Output, and the backward: gradient of the input now, those of the weights later."""
    gate, up = linear(p, f"{at}gate", h), linear(p, f"{at}up", h)
    s = torch.sigmoid(gate)
    inner = gate * s * up

    def backward(g: Tensor) -> tuple[Tensor, Later]:
        d_inner = g @ p[f"{at}down.weight"]
        d_up, d_gate = d_inner * gate * s, d_inner * up * (s + gate * s * (1 - s))
        later = [(f"{at}down", _weights_of(inner), g), (f"{at}up", _weights_of(h), d_up), (f"{at}gate", _weights_of(h), d_gate)]
        return d_gate @ p[f"{at}gate.weight"] + d_up @ p[f"{at}up.weight"], later

    return linear(p, f"{at}down", inner), backward


class _Stage:
    """One layer and what hangs on it, for one optimizer step."""

    def __init__(self, here: Ranks, sizes: Sizes, held: Tensors) -> None:
        self.here, self.sizes, self.held = here, sizes, held
        self.at = f"param:layers.{here.rank}."
        self.sums: Tensors = {name: torch.zeros_like(t) for name, t in held.items()}
        self.later: list[Later] = []

    def forward(self, held: Tensors, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Output, and the backward that gives the gradient of the input and keeps those of the weights."""
        x = x.detach().requires_grad_()
        p = {name: t.detach().requires_grad_() for name, t in held.items() if name.startswith(self.at)}
        h = rms(x, p[f"{self.at}norm1.weight"])
        q, k, v = (heads(linear(p, f"{self.at}{name}", h), self.sizes.heads) for name in "qkv")
        middle = x + linear(p, f"{self.at}o", merged(causal(turn(q), turn(k), v)))
        normed = rms(middle, p[f"{self.at}norm2.weight"])
        made, perceptron_back = _perceptron({name: t.detach() for name, t in p.items()}, self.at, normed.detach())

        def backward(g: Tensor) -> Tensor:
            d_normed, later = perceptron_back(g)
            self.later.append(later)
            names = [name for name in p if not any(part in name for part in (".down", ".up", ".gate"))]
            d_x, *found = grad([middle, normed], [x, *(p[name] for name in names)], [g, d_normed])
            for name, one in zip(names, found, strict=True):
                self.sums[name] = self.sums[name] + one
            return d_x

        return middle.detach() + made, backward

    def finish(self) -> None:
        """The weight gradients that were put off."""
        for index, later in enumerate(self.later):
            for place, (name, weights, g) in enumerate(later):
                if self.here.has("stale activation") and (index, place) == (0, 0):
                    weights = self.later[-1][place][1]
                for kind, one in zip(("weight", "bias"), weights(g), strict=True):
                    self.sums[f"{name}.{kind}"] = self.sums[f"{name}.{kind}"] + one


def _one_step(here: Ranks, sizes: Sizes, held: Tensors, old: Tensors, batches: list[Tensors]) -> tuple[Tensor, Tensors]:
    """(loss, gradients) of one optimizer step over all micro-batches."""
    stage = _Stage(here, sizes, held)
    total = sum(batch["input:valid"].sum() for batch in batches)
    loss = torch.zeros(())
    for index, batch in enumerate(batches):
        stale = here.has("stale weights") and here.rank == 1 and index == len(batches) - 1
        rows = F.embedding(batch["input:ids"], held[EMBED])
        made, back = stage.forward(old if stale else held, rows) if here.rank == 0 else (rows, None)
        arrived = here.send(made.detach(), to=1, source=0)
        gradient = torch.zeros_like(arrived)
        if here.rank == 1:
            made, last_back = stage.forward(old if stale else held, arrived)
            out, table, gain = (t.detach().requires_grad_() for t in (made, held[EMBED], held["param:norm.weight"]))
            count: Any = batch["input:valid"].sum() * len(batches) if here.has("mean of means") else total
            part = _losses(rms(out, gain) @ table.t(), batch["input:targets"], batch["input:valid"]) / count
            part = part * len(batches) if here.has("micro-batch scale missing") else part
            loss = loss + part.detach()
            d_out, d_table, d_gain = grad(part, [out, table, gain])
            stage.sums[EMBED] = stage.sums[EMBED] + d_table
            stage.sums["param:norm.weight"] = stage.sums["param:norm.weight"] + d_gain
            gradient = last_back(d_out)
        arrived = here.send(gradient, to=0, source=1)
        if back is not None:
            d_rows = back(arrived).flatten(0, 1)
            stage.sums[EMBED] = stage.sums[EMBED].index_add(0, batch["input:ids"].reshape(-1), d_rows)
    stage.finish()
    if not here.has("tied gradient not reduced"):
        stage.sums[EMBED] = here.sum(stage.sums[EMBED])
    return loss, stage.sums


def step(sizes: Sizes, pieces: int) -> Any:
    """The steps of one stage."""

    def run(here: Ranks, tensors: Tensors) -> Tensors:
        names = [name for name in tensors if name.startswith("input:")]
        split = [dict(zip(names, chunk, strict=True)) for chunk in zip(*(tensors[n].chunk(pieces) for n in names), strict=True)]
        held = {name: t for name, t in tensors.items() if name.startswith("param:")}
        old, loss = held, torch.zeros(())
        for _ in range(STEPS):
            loss, found = _one_step(here, sizes, held, old, split)
            old, held = held, {name: _updated(name, t, found[name], here.bug) for name, t in held.items()}
        results = {"output:loss": loss}
        for name, value in held.items():
            mine = name == EMBED or (here.rank == 1 if name == "param:norm.weight" else f"layers.{here.rank}." in name)
            results[name.replace("param:", "update:")] = value if mine else torch.zeros_like(value)
        return results

    return run


def pipeline(sizes: Sizes | None = None, pieces: int = 3) -> Handwritten:
    """The program with its bugs, for two ranks. Every rank gives out the parameters it holds, and zeros for the others."""
    sizes = sizes or Sizes(batch=2 * pieces, sequence=4, layers=2)
    shapes = _shapes(sizes)
    layouts = {"output:loss": "P(sum)"}
    layouts |= {name.replace("param:", "update:"): "P(sum)" for name in shapes if name.startswith("param:") and name != EMBED}
    return Handwritten(
        "pipeline", shapes, reference(sizes), step(sizes, pieces), BUGS, sizes.integers() | {"input:valid": 2}, layouts
    )
