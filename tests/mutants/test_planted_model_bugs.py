"""Realistic bugs, planted in the model that is lowered or in its lowered program: each one is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx

from hocket.compiler.layout import Replicate
from hocket.compiler.program import Program, RoleKind, annotate, copy_program, note
from hocket.compiler.verify.levels import Question, ask, ring_level, types_level
from hocket.testing.models import lowered
from hocket.testing.mutations import reduce_twice

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
Plant = Callable[[Program], None]
_lowered = functools.cache(functools.partial(lowered, outputs="replicate"))


def _nodes(program: Program, *targets: object) -> list[fx.Node]:
    return [node for node in program.nodes if node.target in targets]


def _reductions(program: Program) -> list[fx.Node]:
    return _nodes(program, c10d.all_reduce.default)


def _forward_reduction(program: Program) -> fx.Node:
    return next(node for node in _reductions(program) if str(note(node).phase) == "forward" and node.args[1] == "sum")


def _backward_reduction(program: Program) -> fx.Node:
    gradients = {_reduced(node) for node in program.results if node is not None}
    return next(node for node in _reductions(program) if str(note(node).phase) != "forward" and node not in gradients)


def _reduced(node: fx.Node) -> object:
    return node.args[0] if node.target is c10d.wait_tensor.default else None


def _gradient(program: Program, name: str) -> fx.Node:
    node = program.results[program.signature.outputs_of(RoleKind.GRADIENT)[name]]
    assert node is not None
    return node


def _drop(node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def _times(program: Program, node: fx.Node, factor: float) -> None:
    with program.graph.graph.inserting_after(node):
        scaled = program.graph.graph.call_function(aten.mul.Scalar, (node, factor))
    scaled.meta.update(node.meta)
    node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


def missing_forward_reduction(program: Program) -> None:
    _drop(next(node for node in _reductions(program) if str(note(node).phase) == "forward"))


def missing_backward_reduction(program: Program) -> None:
    _drop(_backward_reduction(program))


def doubled_reduction(program: Program) -> None:
    reduce_twice(program, _forward_reduction(program))


def maximum_instead_of_sum(program: Program) -> None:
    _forward_reduction(program).update_arg(1, "max")


def averaged_instead_of_summed(program: Program) -> None:
    _forward_reduction(program).update_arg(1, "avg")


def attention_scale(program: Program) -> None:
    """sqrt of the width instead of the head's width."""
    next(n for n in _nodes(program, aten.div.Tensor, aten.mul.Tensor) if _is_scale(n)).update_arg(1, 8**0.5)


def _is_scale(node: fx.Node) -> bool:
    return isinstance(node.args[1], float) and abs(node.args[1] - 2**0.5) < 1e-9


def causal_mask_off_by_one(program: Program) -> None:
    for node in _nodes(program, aten.triu.default):
        node.update_arg(1, 2)


def bias_gradient_not_reduced(program: Program, name: str) -> None:
    node = _gradient(program, name)
    source = node.args[0].args[0]  # type: ignore[union-attr]
    annotate(source, layouts=((Replicate(),),))  # type: ignore[arg-type]
    node.replace_all_uses_with(source)  # type: ignore[arg-type]


def gradient_averaged_twice(program: Program) -> None:
    node = _gradient(program, "up.weight")
    _times(program, node, 0.5)


def one_term_scaled(program: Program) -> None:
    _times(program, _nodes(program, aten.tanh.default)[0], 1.03)


def epsilon(program: Program) -> None:
    """1e-5 in the model, 1e-6 in its parallel twin."""
    found = [(node, i) for node in program.nodes for i, a in enumerate(node.args) if isinstance(a, float) and abs(a - 1e-5) < 1e-9]
    assert found
    node, place = found[0]
    node.update_arg(place, 1e-6)


def running_variance_biased(program: Program) -> None:
    """Divided by n, not by n - 1."""
    node = program.results[program.signature.outputs_of(RoleKind.UPDATE)["norm.running_var"]]
    assert node is not None
    _times(program, node, 63 / 64)


def router_gradient_not_reduced(program: Program) -> None:
    bias_gradient_not_reduced(program, "router.weight")


def auxiliary_loss_from_local_means(program: Program) -> None:
    _drop([node for node in _reductions(program) if str(note(node).phase) == "forward"][-1])


BUGS: list[tuple[str, Plant]] = [
    ("attention, tensor parallel", missing_backward_reduction),
    ("llama, tensor parallel", maximum_instead_of_sum),
    ("llama, tensor parallel", averaged_instead_of_summed),
    ("attention, tensor parallel", attention_scale),
    ("attention, tensor parallel", causal_mask_off_by_one),
    ("llama, tensor parallel", missing_forward_reduction),
    ("llama, tensor parallel", missing_backward_reduction),
    ("llama, tensor parallel", epsilon),
    ("llama, data and tensor parallel", doubled_reduction),
    ("perceptron, data parallel", missing_forward_reduction),
    ("perceptron, data parallel", functools.partial(bias_gradient_not_reduced, name="up.bias")),
    ("perceptron, data parallel", functools.partial(bias_gradient_not_reduced, name="norm.weight")),
    ("perceptron, data parallel", gradient_averaged_twice),
    ("perceptron, data parallel", one_term_scaled),
    ("perceptron, data parallel", epsilon),
    ("convolution, data parallel", running_variance_biased),
    ("experts, data parallel", router_gradient_not_reduced),
    ("experts, data parallel", auxiliary_loss_from_local_means),
]


def _name(value: object) -> str:
    if isinstance(value, functools.partial):
        return f"{value.func.__name__}, {value.keywords['name']}"
    return str(getattr(value, "__name__", value))


@pytest.mark.parametrize(("case", "plant"), BUGS, ids=_name)
def test_a_planted_bug_is_refused(case: str, plant: Plant) -> None:
    program, parallel = _lowered(case)
    mutant, _ = copy_program(parallel)
    plant(mutant)
    verdict = ask(Question(program, mutant), (types_level, ring_level))
    assert verdict.refused, str(verdict)
    assert verdict.divergence or "gradient:" in str(verdict) or "update:" in str(verdict)
