"""Size arguments on pieces: the localised call makes exactly the piece of the whole result."""

import pytest
import torch
import torch.fx as fx
from rule_helpers import aten

from hocket.compiler.rules.localise import OUTPUT_SIZE_ARGUMENT, STRIDED, localise, names_sizes

x = torch.arange(48.0).view(8, 6)
CASES = {
    # target -> (arguments on the whole, arguments on the first half, size of the half)
    aten.view.default: ((x, [8, 2, 3]), (x[:4], [8, 2, 3]), [4, 2, 3]),
    aten._unsafe_view.default: ((x, [4, 12]), (x[:4], [4, 12]), [2, 12]),
    aten.expand.default: ((x[:, :1], [8, 6]), (x[:4, :1], [8, 6]), [4, 6]),
    aten.new_zeros.default: ((x, [8, 3]), (x, [8, 3]), [4, 3]),
    aten.full.default: (([8, 3], 2.0), ([8, 3], 2.0), [4, 3]),
    aten.slice_backward.default: ((x, [8, 9], 1, 2, 8, 1), (x[:4], [8, 9], 1, 2, 8, 1), [4, 9]),
    aten.select_backward.default: ((x, [8, 3, 6], 1, 2), (x[:4], [8, 3, 6], 1, 2), [4, 3, 6]),
    aten.mul.Tensor: ((x, 2.0), (x[:4], 2.0), [4, 6]),
}


@pytest.mark.parametrize("target", CASES, ids=str)
def test_the_localised_call_makes_the_piece(target):
    whole, piece, size = CASES[target]
    call, args, kwargs = localise(target, piece, {}, size)
    assert torch.equal(call(*args, **kwargs), target(*whole)[: size[0]])


def test_a_size_given_by_name_is_found():
    call, args, kwargs = localise(aten.full.default, (), {"size": [8, 3], "fill_value": 1.0}, [4, 3])
    assert call(*args, **kwargs).shape == (4, 3)


def test_strides_are_dropped_with_the_size():
    call, args, kwargs = localise(aten.new_empty_strided.default, (x, [8, 3], [3, 1]), {}, [4, 3])
    assert call(*args, **kwargs).shape == (4, 3)


def test_samples_of_a_group_norm_are_counted_on_the_piece():
    image, one = torch.randn(4, 6, 5), torch.ones(6)
    whole = aten.native_group_norm(image, one, one, 4, 6, 5, 2, 1e-5)
    call, args, kwargs = localise(aten.native_group_norm.default, (image[:2], one, one, 4, 6, 5, 2, 1e-5), {}, [2, 6, 5])
    assert torch.equal(call(*args, **kwargs)[0], whole[0][:2])


def test_sizes_may_be_nodes_that_give_integers():
    graph = fx.Graph()
    tensor, rows = graph.placeholder("tensor"), graph.placeholder("rows")
    call, args, kwargs = localise(aten.view.default, (tensor, [8, 2, 3]), {}, [rows, 2, 3])
    graph.output(graph.call_function(call, args, kwargs))
    module = fx.GraphModule(torch.nn.Module(), graph)
    assert module(x[:3], 3).shape == (3, 2, 3)


def test_other_ops_come_back_unchanged():
    assert localise(aten.relu.default, (x,), {}, [4, 6]) == (aten.relu.default, (x,), {})
    assert not names_sizes(aten.relu.default)


@pytest.mark.parametrize("target", [*OUTPUT_SIZE_ARGUMENT, *STRIDED], ids=str)
def test_the_argument_named_in_the_table_is_a_list_of_integers(target):
    _, position = {**OUTPUT_SIZE_ARGUMENT, **STRIDED}[target]
    assert str(target._schema.arguments[position].type) in ("List[int]", "List[SymInt]")
