"""The patterns of the tests, fused by hocket's pass and by torch's own async-TP pass (``_inductor.fx_passes.micro_pipeline_tp``).

torch's pass rewrites graphs for symmetric memory on GPUs and leaves everything alone where there is none, so its two questions
about the machine are answered with yes here: what is counted is which patterns it recognises. It does not shorten a contracted
dimension below 1024, and the patterns are small; a gather along a later dimension is written as hocket's shard pass does.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from unittest import mock

import torch.distributed
import torch.distributed._symmetric_memory
from common import Row
from torch._inductor.fx_passes.micro_pipeline_tp import micro_pipeline_tp_pass

from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.program import Program, copy_program
from hocket.compiler.rules.table import RuleTable
from hocket.passes.tiles.fuse import FuseTiles
from hocket.runtime.mesh import Mesh

CLAIM = "patterns around a collective"


def pattern_rows() -> list[Row]:
    """How many patterns become loops, are kept for a reason, and are recognised by torch's pass."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "passes"))
    from tile_patterns import PATTERNS, program_of

    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    rules = RuleTable(None)
    fused, kept, theirs, failed = 0, 0, 0, 0
    for pattern in PATTERNS.values():
        program = program_of(pattern, 2)
        done = FuseTiles(least_gain=-1e9)(program, Context(Mesh((("tp", 2),)), rules, Cluster.default()))
        fused += any(d.applied for d in done.decisions)
        kept += not any(d.applied for d in done.decisions) and all(d.reason for d in done.decisions)
        recognised = fused_by_torch(program)
        theirs += recognised is True
        failed += recognised is None
    text = f"{fused} fused, {kept} kept for a reason, of {len(PATTERNS)}; torch's async-TP pass recognises {theirs}"
    text += f", and raises an error of its own on {failed}" * bool(failed)
    whole = (fused + kept) / len(PATTERNS)
    return [Row(CLAIM, "forward and backward of layers", whole, "", goal="= 100%", met=whole == 1.0, text=text)]


def fused_by_torch(program: Program) -> bool | None:
    """Whether torch's pass puts one of its fused ops into the graph; None where it raises."""
    graph = copy_program(program)[0].graph.graph
    for node in graph.nodes:  # which Inductor has dropped before this pass
        if node.target is torch.ops.aten.contiguous.default and node.args[0].meta["val"].is_contiguous():
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    with (
        mock.patch.object(torch.distributed, "is_nccl_available", return_value=True),
        mock.patch.object(torch.distributed._symmetric_memory, "is_symm_mem_enabled_for_group", return_value=True),
    ):
        try:
            micro_pipeline_tp_pass(graph)
            failed = False
        except (AttributeError, KeyError):  # at a second collective, after the first was fused or not
            failed = True
    found = any("symm_mem" in str(node.target) for node in graph.nodes)
    return None if failed and not found else found
