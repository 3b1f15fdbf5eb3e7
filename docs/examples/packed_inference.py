"""Serve an encoder in two stages; batches with much padding run on their valid tokens only.

python docs/examples/packed_inference.py
"""

import torch
from torch import nn

from hocket.compiler.doors.packed_inference import PackedInference, Packing


class Encoder(nn.Module):
    """Two blocks of attention and feed-forward that keep to their mask."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """x [rows, positions, width]; mask [rows, positions], nonzero where a token is valid."""
        padding = torch.zeros(mask.shape).masked_fill(mask == 0, float("-inf"))
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        return x


def main() -> None:
    """Serve three batches of different lengths."""
    model = Encoder()
    x, mask = torch.randn(8, 64, 64), torch.ones(8, 64, dtype=torch.long)
    with PackedInference(model, (x,), {"mask": mask}, Packing("mask", shares=(0.25, 0.5))) as served:
        for decision in served.decisions:
            print(decision.reason)
        for length in (12, 30, 60):
            mask = (torch.arange(64) < length).long().expand(8, 64).contiguous()
            result = served.submit(x, mask=mask).result()
            torch.testing.assert_close(result[mask != 0], model(x, mask)[mask != 0], rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main()
