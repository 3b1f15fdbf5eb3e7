"""Losses decomposed so that the batch can be cut: same loss, same gradient, and nothing but scalars to reduce."""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from hocket.compiler.layout import Shard
from hocket.compiler.rules.decompose import exact_decompositions
from hocket.compiler.rules.table import RuleTable

TARGET = torch.tensor([1, 2, -100, 0, 3, -100, 1, 2])
LOSSES = {
    "cross entropy": (lambda x: F.cross_entropy(x, TARGET)),
    "cross entropy with weights": (lambda x: F.cross_entropy(x, TARGET, weight=torch.arange(1.0, 6.0, dtype=x.dtype))),
    "summed cross entropy": (lambda x: F.cross_entropy(x, TARGET, reduction="sum")),
    "mean square": (lambda x: F.mse_loss(x, torch.ones_like(x))),
    "smooth l1": (lambda x: F.smooth_l1_loss(x, torch.ones_like(x))),
    "huber": (lambda x: F.huber_loss(x, torch.ones_like(x))),
    "binary cross entropy": (lambda x: F.binary_cross_entropy(x.sigmoid(), torch.ones_like(x))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_unchanged_and_every_op_cuts_the_batch(name):
    def step(x):
        loss = LOSSES[name](x)
        return loss, torch.autograd.grad(loss, [x])[0]

    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    graph = make_fx(step, decomposition_table=exact_decompositions())(x)
    graph.graph.eliminate_dead_code()
    for found, expected in zip(graph(x), step(x), strict=True):
        torch.testing.assert_close(found, expected)
    table = RuleTable(None)
    for node in graph.graph.nodes:
        value = node.meta.get("val", node.meta.get("tensor_meta"))
        if node.op == "call_function" and value is not None and value.shape[:1] == (8,):
            assert any(rule.outputs == (Shard(0),) for rule in table.rules(node, 2)), node.format_node()
