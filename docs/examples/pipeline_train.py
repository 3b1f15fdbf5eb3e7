"""Two stages, each on two replicas, train on real text with the optimizer on the stages; then one process goes on from there."""

import copy

import torch

import hocket
from hocket.compiler.demo.llama import Llama, LlamaConfig
from hocket.compiler.demo.text import batches


def build() -> Llama:
    """A small model of the Llama family."""
    return Llama(LlamaConfig(vocabulary=256, width=32, layers=2, heads=2, kv_heads=2, hidden=64, context=16))


def main() -> None:
    """Train on four ranks, load the checkpoint into the plain model, and take the same next step with both."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = batches(8, 16)  # the text of Python's language reference, byte by byte
    pipeline = hocket.PipelineParallel(microbatches=2)  # "auto", or the rows of each such as [4, 2, 2], will do as well
    with hocket.train_step(model, "pp=2,dp=2", optimizer, tactics=[pipeline], clip_norm=1.0) as step:
        for number in range(5):
            loss = step(*next(data))
            print(f"step {number}: loss {loss.item():.4f}")
        checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        print("sums over replicas that wait for the last micro-batch:", step.explain("sum-once").count("sum-once"))

        plain = build()
        plain.load_state_dict(checkpoint[0])
        alone = torch.optim.AdamW(plain.parameters(), lr=3e-3)
        alone.load_state_dict(checkpoint[1])
        tokens, targets = next(data)
        plain(tokens, targets).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        alone.step()
        step(tokens, targets)
    difference = max((one - other).abs().max().item() for one, other in zip(model.parameters(), plain.parameters(), strict=True))
    print("the next step is that of one process, but for rounding:", difference < 1e-4)


if __name__ == "__main__":
    main()
