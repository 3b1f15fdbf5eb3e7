"""The foundation's claims: step time on real ranks, starting and dispatching, lowering and simulation, bytes on the wire.

    python benchmarks/step.py [--quick] [--json FILE] [--check] [--only TEXT]

Peers (plain torch, torch's DTensor tensor parallelism, DistributedDataParallel, LocalTensorMode) are measured in the same run, in
alternating blocks. A full run takes some minutes and rewrites docs/benchmarks/step.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import step_compile
import step_exchange
import step_inductor
import step_planning
import step_runtime
import step_train
import step_vocabulary
import step_wire
from common import Row, arguments, machine, measured, report

INTRO = """
What one training step costs (forward, backward and AdamW of the demo's Llama), and what surrounds it. Ratios say how many times
faster hocket is than the peer beside it. Figures are medians of alternating blocks; ± is half the distance between the quartiles.
Two ranks have one thread each; "1 process, 1 thread" is plain torch. The peers' tensor parallelism is `parallelize_module` with
`ColwiseParallel` and `RowwiseParallel`, on two gloo processes with one thread each. Cores of a virtual machine may be shared with
others: "what two cores can give" is the speed-up of two processes that never talk to each other, measured in the same turns.
"""


def main() -> None:
    """Measure the groups that are asked for and report them."""
    options = arguments(__doc__)
    where = machine()
    warnings.filterwarnings("ignore", category=FutureWarning)
    groups: dict[str, Callable[[], list[Row]]] = {
        "runtime": lambda: step_runtime.rows(quick=options.quick),
        "compile": lambda: step_compile.rows(quick=options.quick),
        "wire": step_wire.rows,
        "exchange": step_exchange.rows,
        "step": lambda: step_train.rows(quick=options.quick),
        "vocabulary": lambda: step_vocabulary.rows(quick=options.quick),
        "inductor": lambda: step_inductor.rows(quick=options.quick),
        "planning": lambda: step_planning.rows(quick=options.quick),
    }
    report("step", "The step and what surrounds it", INTRO, measured(groups, options), options, where)


if __name__ == "__main__":
    main()
