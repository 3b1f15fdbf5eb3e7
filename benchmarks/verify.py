"""What the proof catches and what it costs: random mutants, planted bugs, false alarms, and CPU time beside that of compilation.

python benchmarks/verify.py [--quick] [--json FILE] [--check] [--only TEXT] [--parts FILE]

A full run takes some tens of minutes. With --parts it remembers in FILE every part that is done and, started again, goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import verify_cost
import verify_detectors
import verify_mutants
from common import Row, machine, parser, progress, report

from hocket.testing.models import CASES

INTRO = """
Random mutants are small changes of programs that hocket itself has lowered (a lost or doubled collective, a scalar off by a
thousandth, a rewired input, a wrong layout, one rank's term counted twice, ...). A mutant is live if it computes something else in
float64. The other checkers compare outputs, gradients and updates of the same mutants, run in float32 or bfloat16, with the usual
tolerances.

Thirty-five bugs that people make are planted in five hand-written programs on two ranks: tensor parallelism, ring attention, a
pipeline with micro-batches and split backward, a mixture of experts, and synchronised batch norm. The ring sees them at its small
sizes; the comparisons in floating point are made at larger ones, on weights as after training (standard deviation 0.02, gains
near 1, small biases), on the loss, every gradient, and every update.

Times are CPU seconds of one core.
"""

MUTANTS = 112
"""A model."""


@dataclass
class Parts:
    """Figures of the parts of a run; file: where they are kept between runs."""

    file: Path | None
    done: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            self.done = json.loads(self.file.read_text())

    def get(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The figures of a part, measured now if they are not known."""
        if name not in self.done:
            progress(name)
            self.done[name] = json.loads(json.dumps(dict(measure())))
            if self.file is not None:
                self.file.write_text(json.dumps(self.done))
        found: dict[str, Any] = self.done[name]
        return found


def mutant_rows(parts: Parts, *, quick: bool) -> list[Row]:
    """Random mutants of every model."""
    count = 1 if quick else MUTANTS
    return verify_mutants.mutation_rows(
        [parts.get(f"mutants: {case}, {count}", lambda case=case: verify_mutants.judge_case(case, count)) for case in CASES]
    )


def bug_rows(parts: Parts, *, quick: bool) -> list[Row]:
    """Planted bugs of every hand-written program."""
    names = [name for name in verify_detectors.PROGRAMS if not (quick and name in verify_detectors.SLOW)]
    found = [parts.get(f"bugs: {name}", lambda name=name: verify_detectors.judge_program(name)) for name in names]
    return verify_detectors.detector_rows(found)


def cost_rows(parts: Parts, *, quick: bool) -> list[Row]:
    """Cost and share of compilation."""
    layers, repeats = (8, 1) if quick else (80, 3)
    types = parts.get("cost: types", lambda: verify_cost.wide(repeats))
    proof = parts.get(f"cost: {layers} layers", lambda: verify_cost.deep(layers, repeats))
    doors = {
        axis: parts.get(f"cost: door {axis}, {layers} layers", lambda axis=axis: verify_cost.door(axis, layers))
        for axis in verify_cost.TACTICS
    }
    return verify_cost.cost_rows(layers, types, proof, doors)


GROUPS = {"mutants": mutant_rows, "bugs": bug_rows, "cost": cost_rows}


def main() -> None:
    """Measure, and report."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--parts", type=Path, metavar="FILE", help="remember finished parts in FILE, and go on after them")
    options = options_parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    where, parts = machine(), Parts(options.parts)
    rows = [row for name, group in GROUPS.items() if options.only in name for row in group(parts, quick=options.quick)]
    report("verify", "Verification", INTRO, rows, options, where)


if __name__ == "__main__":
    main()
