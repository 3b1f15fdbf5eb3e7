"""What solving recurrences in parallel gains, and what it does not: recurrent layers, decisions, sampling, decoding.

    python benchmarks/chain.py [--quick] [--json FILE] [--check] [--only TEXT]

Everything but the GPU section runs on one thread and is measured in CPU seconds, in alternating turns with its peer. A full run
takes some minutes, trains three small models (kept for the next run) and rewrites docs/benchmarks/chain.md. ``--only`` takes one of
recurrent, training, decide, sample, pixels, depth, time, decode, gpu; the last is empty where there is no CUDA device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import chain_decide
import chain_decode
import chain_depth
import chain_gpu
import chain_pixels
import chain_recurrent
import chain_sample
import chain_time
from common import Row, arguments, machine, measured, report

INTRO = """
`Jacobi()` on models that are not changed, beside torch; `hocket.sample` and `hocket.generate` beside the fair baselines, which
compute nothing twice. Ratios say how many times faster hocket is. One thread, CPU time, medians of alternating turns. Published
figures of the method (Song et al., ICML 2021): MADE on MNIST 27x over pixel by pixel on a GPU; DenseNet 2.1x by an estimate that
needs one device a layer; the backward of an RNN with a fixed number of sweeps, so truncated, against a loop that updates the
gradient of the weight in every step. Recurrent layers are compiled without proof here; the tests prove them.
"""


def main() -> None:
    """Measure the groups that are asked for and report them."""
    options = arguments(__doc__)
    where = machine()
    warnings.filterwarnings("ignore")
    os.environ["HOCKET_CHAINS"] = "off"  # every run measures for itself
    groups: dict[str, Callable[[], list[Row]]] = {
        "recurrent": lambda: chain_recurrent.rows(quick=options.quick),
        "training": lambda: chain_recurrent.training_rows(quick=options.quick),
        "decide": lambda: chain_decide.rows(quick=options.quick),
        "sample": lambda: chain_sample.rows(quick=options.quick),
        "pixels": lambda: chain_pixels.rows(quick=options.quick),
        "depth": lambda: chain_depth.rows(quick=options.quick),
        "time": lambda: chain_time.rows(quick=options.quick),
        "decode": lambda: chain_decode.rows(quick=options.quick),
        "gpu": lambda: chain_gpu.rows(quick=options.quick),
    }
    report("chain", "Recurrences solved in parallel", INTRO, measured(groups, options), options, where)


if __name__ == "__main__":
    main()
