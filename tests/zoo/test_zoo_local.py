"""Models of the zoo on two real ranks give the outputs, gradients and buffers of eager PyTorch."""

from __future__ import annotations

import pytest
from zoo_check import assert_like_eager, is_cut
from zoo_models import CASES

from hocket.compiler.plan.tactics import TensorParallel

QUICK = ("changed_input", "batch_norm", "dropout", "complex_rotary")
SLOW = (
    "dict_in_and_keywords",
    "tied_weights",
    "in_place_and_a_counter",
    "activation_checkpointing",
    "outputs_that_are_inputs_and_parameters",
    "uneven_sizes",
    "convolutions",
    "cell_loop",
    "routed_experts",
    "causal_grouped_attention",
    "embedding_bag",
    "cross_entropy_with_ignored_targets",
    *(name for name, case in CASES.items() if case.slow),
)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_two_processes_equal_eager(name: str) -> None:
    assert is_cut(assert_like_eager(CASES[name], "d=2", "local", "auto"))


@pytest.mark.parametrize(
    "name", ["encoder_layer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "gpt2", "t5"))]
)
def test_tensor_parallel_over_two_processes_equals_eager(name: str) -> None:
    assert is_cut(assert_like_eager(CASES[name], "tp=2", "local", [TensorParallel("tp")]))
