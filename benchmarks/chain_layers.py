"""A recurrent layer of torch as the one chain that it is, for measuring without the door in front of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import hocket
from hocket.compiler.chains.cells import recurrences
from hocket.compiler.contract import Context
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.rules.table import RuleTable
from hocket.runtime.fixedpoint.body import read_body
from hocket.runtime.fixedpoint.op import chain_op
from hocket.runtime.fixedpoint.steps import Chain

INPUT = 32


class Layer(NamedTuple):
    """module, x: the layer and its input; chain, how: what the pass makes of them, how as text."""

    module: nn.Module
    x: Tensor
    chain: Chain
    how: str

    def solved(self) -> list[Tensor]:
        """The last states, then the outputs."""
        chain = self.chain
        return list(chain_op()(chain.init, chain.shared, chain.streams, chain.count, chain.body.text, self.how))


def whole_layer(kind: str, sizes: tuple[int, int, int], device: str = "cpu") -> Layer:
    """kind: RNN, GRU or LSTM; sizes: steps, batch, width. It is captured on the CPU: a chain's body is the same on every device."""
    steps, batch, width = sizes
    torch.manual_seed(0)
    module, x = getattr(nn, kind)(INPUT, width).requires_grad_(requires_grad=False), torch.randn(steps, batch, INPUT)
    with recurrences():
        program = hocket.capture(module, (x,), train=False)
    (jacobi,) = hocket.Jacobi().rewrites_before()
    program = jacobi(program, Context(hocket.Mesh.parse("one=1"), RuleTable(None), Cluster.current()))
    (node,) = [n for n in program.nodes if n.target is chain_op()]
    module, x = module.to(device), x.to(device)
    states = [x.new_zeros(batch, width) for _ in range(2 if kind == "LSTM" else 1)]
    chain = Chain(read_body(str(node.args[4])), states, list(module.parameters()), [x], steps)
    return Layer(module, x, chain, str(node.args[5]))
