"""Two stages on two processes learn real text; the gradients are those of the plain model, bit for bit."""

import copy

import torch

import hocket
from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.demo.text import batches


def main() -> None:
    """A few steps, then a comparison with the plain model."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(vocabulary=256, width=32, layers=4, heads=2, kv_heads=2, hidden=64, context=32))
    data = batches(8, 32)  # the text of Python's language reference, byte by byte
    tokens, targets = next(data)
    pipeline = hocket.PipelineParallel(microbatches=4, schedule="1f1b-2bp")
    with hocket.parallelize(model, "pp=2", (tokens, targets), tactics=[pipeline]) as stages:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(6):
            optimizer.zero_grad()
            loss = stages.train_step(tokens, targets)
            if step == 5:
                break
            optimizer.step()
            print(f"step {step}: loss {loss.item():.4f}")
            tokens, targets = next(data)

    plain = copy.deepcopy(model)
    plain.zero_grad()
    for x, y in zip(tokens.chunk(4), targets.chunk(4), strict=True):
        (plain(x, y) / 4).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    same = all(torch.equal(one.grad, other.grad) for one, other in pairs if one.grad is not None and other.grad is not None)
    print("gradients equal to the plain model's to the last bit:", same)
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
