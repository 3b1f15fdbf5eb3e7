"""A pass of your own, proven by the pass manager; and a careless variant of it, which is refused.

    silu(x) = x * sigmoid(x)

The pass writes every ``silu`` of the forward as that product. The careless variant forgets the factor x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import hocket
from hocket.compiler.contract import Context, Contract, Equal
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Decision, Phase, Program, annotate, copy_program, note
from hocket.compiler.rules.table import RuleTable

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitSilu:
    """silu(x) -> x * sigmoid(x). careless: leave out the product, as a bug would."""

    name: ClassVar[str] = "split-silu"
    contract: ClassVar[Contract] = Equal()
    careless: bool = False

    def __call__(self, program: Program, context: Context) -> Program:
        """The program with its silus written out, and one decision per silu looked at."""
        new, _ = copy_program(program)
        decisions = []
        for node in [n for n in new.nodes if n.target is aten.silu.default]:
            applies = note(node).phase is Phase.FORWARD
            reason = f"{node.name} written as a product" if applies else f"{node.name} is part of the backward"
            decisions.append(Decision(self.name, node.name, applies, reason, source=note(node).source))
            if applies:
                self._rewrite(new.graph.graph, node)
        return new.decided(*decisions)

    def _rewrite(self, graph: fx.Graph, node: fx.Node) -> None:
        (x,) = node.args
        with graph.inserting_before(node):
            result = graph.call_function(aten.sigmoid.default, (x,))
            made = [result]
            if not self.careless:
                result = graph.call_function(aten.mul.Tensor, (x, result))
                made.append(result)
        for new in made:
            new.meta.update(node.meta)  # same shape and dtype, same note
            annotate(new, added_by=self.name, origin="" if new is not result else note(node).origin)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


class Net(nn.Module):
    """Two linears with a silu between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


torch.manual_seed(0)
mesh = hocket.Mesh.parse("tp=2")
program = hocket.capture(Net(), (torch.randn(4, 8),))
context = Context(mesh, RuleTable(), Cluster.current())

rewritten, records = run_passes(program, (SplitSilu(),), context)
print(records[0])
for decision in rewritten.decisions:
    if decision.by == SplitSilu.name:
        print("applied" if decision.applied else "kept", "|", decision.reason, "|", decision.source)

try:
    run_passes(program, (SplitSilu(careless=True),), context)
except hocket.errors.VerificationError as error:
    print("refused:", str(error)[:300], "...")
else:
    raise SystemExit("the careless pass was not refused")

x = torch.randn(4, 8)
with hocket.parallelize(Net(), mesh, (x,), tactics=[hocket.Rewrites(before=(SplitSilu(),))], engine="sim") as model:
    print("in a compile of its own:", "split-silu" in model.explain(), tuple(model(x).shape))
