"""A recurrent layer cut in time: two ranks take half of the sequence each, and hand on where they ended."""

import torch
from torch import nn

import hocket


def main() -> None:
    torch.manual_seed(0)
    model, x = nn.RNN(8, 16), torch.randn(101, 4, 8)  # an uneven length: 51 steps and 50
    expected = model(x)[0]

    tactics = [hocket.Jacobi(axis="t")]
    with torch.no_grad(), hocket.parallelize(model, "t=2", (x,), tactics=tactics, engine="sim") as parallel:
        found = parallel(x)[0]
        print("each rank runs a segment of the steps:", "segments" in str(parallel.explain()))
        print("equal to the plain layer but for rounding:", torch.allclose(found, expected, rtol=0, atol=2e-6))


if __name__ == "__main__":
    main()
