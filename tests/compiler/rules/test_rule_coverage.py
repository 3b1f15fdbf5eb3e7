"""Joint graphs of ordinary models: every op has a rule that cuts it, or says why not."""

import operator

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from rule_helpers import aten
from torch.fx.experimental.proxy_tensor import make_fx

from hocket.compiler.layout import Partial, Shard
from hocket.compiler.rules.decompose import exact_decompositions
from hocket.compiler.rules.table import RuleTable


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(width, heads), nn.RMSNorm(width), nn.LayerNorm(width)
        self.up, self.gate, self.down = (nn.Linear(a, b, bias=False) for a, b in ((width, 64), (width, 64), (64, width)))

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * F.gelu(self.up(y)))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(96, 32), nn.Linear(32, 96, bias=False)
        self.blocks = nn.Sequential(Block(32, 4), Block(32, 4))

    def forward(self, tokens, targets):
        return F.cross_entropy(self.head(self.blocks(self.embed(tokens))).flatten(0, 1), targets.flatten())


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.GELU(), nn.Conv2d(32, 32, 3, groups=32)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        )

    def forward(self, x, y):
        return F.cross_entropy(self.layers(x), y, label_smoothing=0.1)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16, 32)), nn.Parameter(torch.randn(4, 32, 16))

    def forward(self, x, y):
        p = self.gate(x).softmax(-1)
        k, i = p.topk(2, -1)
        weight = torch.zeros_like(p).scatter(-1, i, k)
        h = torch.einsum("btef,efd->bted", torch.einsum("btd,edf->btef", x, self.up).relu(), self.down)
        return F.mse_loss((h * weight.unsqueeze(-1)).sum(2), y)


MODELS = {
    "language": (Language, lambda: (torch.randint(0, 96, (4, 16)), torch.randint(0, 96, (4, 16)))),
    "images": (Images, lambda: (torch.randn(4, 4, 16, 16), torch.randint(0, 10, (4,)))),
    "experts": (Experts, lambda: (torch.randn(4, 8, 16), torch.randn(4, 8, 16))),
}

WITHOUT_A_CUT = {aten.arange.default, aten.scalar_tensor.default, aten.zeros.default, aten.ones_like.default, operator.getitem}


def joint_graph(model: nn.Module, inputs) -> torch.fx.GraphModule:
    params = dict(model.named_parameters())

    def step(params, *inputs):
        loss = torch.func.functional_call(model, params, inputs)
        return loss, torch.autograd.grad(loss, list(params.values()))

    graph = make_fx(step, tracing_mode="fake", decomposition_table=exact_decompositions())(params, *inputs)
    graph.graph.eliminate_dead_code()
    return graph


def ops(graph: torch.fx.GraphModule):
    return [
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)
    ]


@pytest.mark.parametrize("name", MODELS)
def test_every_op_has_a_rule_or_a_reason(name):
    make, inputs = MODELS[name]
    table = RuleTable(None)
    for node in ops(joint_graph(make(), inputs())):
        answer = table.answer(node, 2)
        assert len(answer.rules) > 1 or answer.reason, node.format_node()
        has_dims = any(size > 1 for t in [node.meta["val"]] if isinstance(t, torch.Tensor) for size in t.shape)
        if node.target not in WITHOUT_A_CUT and has_dims:
            assert len(answer.rules) > 1, f"{node.format_node()}: {answer.reason}"


@pytest.mark.parametrize("name", ["language", "experts"])
def test_the_batch_can_be_cut_from_the_inputs_to_the_loss_and_all_gradients(name):
    """Data parallelism without a gather: propagate Shard(0) of the data; only scalars and parameter gradients may be reduced."""
    make, inputs = MODELS[name]
    model = make()
    graph = joint_graph(model, inputs())
    count = len(dict(model.named_parameters()))
    reducible = {1, *(p.numel() for p in model.parameters())}  # a gradient may be transposed or viewed
    table = RuleTable(None)
    placed, seen = {}, 0
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            placed[node] = Shard(0) if seen >= count else None
            seen += 1
    for node in ops(graph):
        if node.target is operator.getitem:
            placed[node] = placed[node.args[0]][node.args[1]]
            continue
        placed[node] = _follow(table, node, placed)
        if not isinstance(node.meta["val"], torch.Tensor):
            continue
        if isinstance(placed[node], Partial):
            assert node.meta["val"].numel() in reducible, node.format_node()


def _follow(table, node, placed):
    """The outputs of the rule that takes the operands as they lie; partial scalars may be reduced, nothing may be gathered."""
    from hocket.compiler.program import tensor_inputs

    operands = tensor_inputs(node)
    lies = [placed.get(operand) for operand in operands]

    def disturbed(rule) -> int:
        return sum(
            isinstance(p, (Shard, Partial)) != isinstance(has, (Shard, Partial)) for p, has in zip(rule.inputs, lies, strict=True)
        )

    for rule in sorted(table.rules(node, 2), key=disturbed):
        for operand, wanted in zip(operands, rule.inputs, strict=True):
            has = placed.get(operand)
            reducible = isinstance(has, Partial) and operand.meta["val"].numel() <= 1 and not isinstance(wanted, (Shard, Partial))
            whole = has is None and not isinstance(wanted, Partial)
            if not (wanted == has or reducible or whole):
                break
        else:
            outputs = [None if p is None or type(p).__name__ == "Replicate" else p for p in rule.outputs]
            return outputs[0] if isinstance(node.meta["val"], torch.Tensor) else outputs
    raise AssertionError(f"{node.format_node()} would need a gather of {[placed.get(n) for n in operands]}")


@pytest.mark.slow
def test_every_core_aten_op_that_torchs_samples_reach_has_a_rule_or_a_reason():
    from core_aten_samples import core_aten_nodes

    table = RuleTable(None)
    reached = core_aten_nodes()
    assert len(reached) >= 140
    for target, nodes in reached.items():
        for node in nodes:
            answer = table.answer(node, 2)
            assert len(answer.rules) > 1 or answer.reason, str(target)
