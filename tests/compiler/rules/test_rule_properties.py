"""For random ops, sizes and numbers of parts: every rule handed out holds at the true sizes, by an independent check."""

import hypothesis.strategies as st
import torch
from hypothesis import example, given, settings
from rule_helpers import aten, op_node, pieces_make_the_whole

from hocket.compiler.rules.table import RuleTable

TABLE = RuleTable(None)
sizes = st.integers(1, 7)
parts = st.integers(2, 4)
bounded = settings(max_examples=20, deadline=None)


def every_rule_holds(node, count: int) -> None:
    for rule in TABLE.rules(node, count):
        assert pieces_make_the_whole(node, rule, count), f"{node.format_node()} {rule} at {count} parts"


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@bounded
@given(m=sizes, k=sizes, n=sizes, b=sizes, count=parts)
def test_contractions(m, k, n, b, count):
    every_rule_holds(op_node(aten.mm.default, values(m, k), values(k, n)), count)
    every_rule_holds(op_node(aten.addmm.default, values(n), values(m, k), values(k, n)), count)
    every_rule_holds(op_node(aten.bmm.default, values(b, m, k), values(b, k, n)), count)


@bounded
@given(
    shape=st.lists(sizes, min_size=1, max_size=3),
    drop=st.integers(0, 3),
    ones=st.lists(st.booleans(), min_size=3, max_size=3),
    count=parts,
)
def test_pointwise_ops_with_broadcasting(shape, drop, ones, count):
    other = [1 if one else size for size, one in zip(shape, ones, strict=False)][min(drop, len(shape) - 1) :]
    a, b = values(*shape), values(*other)
    for target in (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.maximum.default):
        every_rule_holds(op_node(target, a, b), count)
    every_rule_holds(op_node(aten.where.self, a > 0, a, b), count)
    every_rule_holds(op_node(aten.tanh_backward.default, a, a.tanh()), count)


@bounded
@given(factors=st.lists(st.integers(1, 6), min_size=2, max_size=4), data=st.data(), count=parts)
def test_reshapes(factors, data, count):
    def grouped() -> list[int]:
        shape = [1]
        for factor in factors:
            if data.draw(st.booleans()):
                shape[-1] *= factor
            else:
                shape.append(factor)
        return shape

    every_rule_holds(op_node(aten.view.default, values(*grouped()), grouped()), count)


@bounded
@given(shape=st.lists(sizes, min_size=2, max_size=3), dim=st.integers(-2, 1), keep=st.booleans(), count=parts)
def test_reductions_and_ops_along_a_dimension(shape, dim, keep, count):
    x = values(*shape)
    for target in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default):
        every_rule_holds(op_node(target, x, [dim], keep), count)
    for node in (
        op_node(aten._softmax.default, x, dim, False),
        op_node(aten.cumsum.default, x, dim),
        op_node(aten.sort.default, x, dim),
        op_node(aten.flip.default, x, [dim]),
        op_node(aten.cat.default, [x, x + 1], dim),
        op_node(aten.stack.default, [x, x + 1], dim),
        op_node(aten.select.int, x, dim, shape[dim] - 1),
        op_node(aten.slice.Tensor, x, dim, 0, max(1, shape[dim] - 1)),
        op_node(aten.split.Tensor, x, 2, dim),
        op_node(aten.transpose.int, x, 0, dim),
        op_node(aten.slice_backward.default, x, [*shape[:-1], shape[-1] + 2], len(shape) - 1, 1, shape[-1] + 1, 1),
        op_node(aten.select_backward.default, x, [shape[0], 3, *shape[1:]], 1, 2),
    ):
        every_rule_holds(node, count)


@settings(max_examples=12, deadline=None)
@given(rows=sizes, width=sizes, batch=sizes, length=sizes, count=parts)
def test_indexing_and_its_gradients(rows, width, batch, length, count):
    index = torch.randint(0, rows, (batch, length))
    every_rule_holds(op_node(aten.embedding.default, values(rows, width), index), count)
    every_rule_holds(op_node(aten.embedding_dense_backward.default, values(batch, length, width), index, rows, -1, False), count)
    across = torch.randint(0, rows, (batch, length))
    every_rule_holds(op_node(aten.gather.default, values(batch, rows), 1, across), count)
    every_rule_holds(op_node(aten.scatter_add.default, values(batch, rows), 1, across, values(batch, length)), count)
    every_rule_holds(op_node(aten.index_select.default, values(batch, rows), 1, across[0]), count)
    every_rule_holds(op_node(aten.index.Tensor, values(rows, width), [index]), count)


@settings(max_examples=12, deadline=None)
@given(batch=sizes, heads=st.integers(1, 6), queries=sizes, keys=sizes, causal=st.booleans(), masked=st.booleans(), count=parts)
def test_attention_and_its_gradients(batch, heads, queries, keys, causal, masked, count):
    q, k = values(batch, heads, queries, 4), values(batch, heads, keys if not causal else queries, 4)
    mask = values(queries, k.shape[2]) if masked and not causal else None
    node = op_node(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, k, 0.0, causal, attn_mask=mask)
    every_rule_holds(node, count)
    out, lse = node.meta["val"]
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    every_rule_holds(op_node(backward, out, q, k, k, out, lse, 0.0, causal, attn_mask=mask), count)


@settings(max_examples=12, deadline=None)
@given(batch=sizes, length=sizes, width=st.integers(2, 9), count=parts, affine=st.booleans())
def test_norms_and_their_gradients(batch, length, width, count, affine):
    x, w = values(batch, length, width), values(width) if affine else None
    node = op_node(aten.native_layer_norm.default, x, [width], w, w, 1e-5)
    every_rule_holds(node, count)
    _, mean, rstd = node.meta["val"]
    mask = [True, affine, affine]
    every_rule_holds(op_node(aten.native_layer_norm_backward.default, x, x, [width], mean, rstd, w, w, mask), count)


@settings(max_examples=12, deadline=None)
@given(
    batch=sizes,
    groups=st.sampled_from([1, 2, 3]),
    inner=st.integers(1, 3),
    outer=st.integers(1, 3),
    count=parts,
    transposed=st.booleans(),
)
def test_convolutions_and_their_gradients(batch, groups, inner, outer, count, transposed):
    c, o = groups * inner, groups * outer
    image, bias = values(batch, c, 5, 5), values(o)
    weight = values(c, outer, 3, 3) if transposed else values(o, inner, 3, 3)
    rest = [[1, 1], [1, 1], [1, 1], transposed, [0, 0], groups]
    node = op_node(aten.convolution.default, image, weight, bias, *rest)
    every_rule_holds(node, count)
    every_rule_holds(op_node(aten.convolution_backward.default, node.meta["val"], image, weight, [o], *rest, [True] * 3), count)


@settings(max_examples=12, deadline=None)
@example(batch=1, classes=2, reduction=0, ignore=False, count=2)  # a lone target that is ignored hides every mistake
@given(batch=st.integers(1, 9), classes=st.integers(2, 9), reduction=st.integers(0, 2), ignore=st.booleans(), count=parts)
def test_losses(batch, classes, reduction, ignore, count):
    logp, target = values(batch, classes).log_softmax(-1), torch.randint(0, classes, (batch,))
    if ignore:
        target[0] = -100
    node = op_node(aten.nll_loss_forward.default, logp, target, None, reduction, -100)
    if not (ignore and batch == 1):
        every_rule_holds(node, count)
    out, total = node.meta["val"]
    every_rule_holds(
        op_node(aten.nll_loss_backward.default, torch.ones_like(out), logp, target, None, reduction, -100, total), count
    )
