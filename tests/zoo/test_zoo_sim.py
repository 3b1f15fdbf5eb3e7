"""Every model of the zoo, cut over simulated ranks in several ways, gives the outputs, gradients and buffers of eager PyTorch."""

from __future__ import annotations

import pytest
from zoo_check import assert_like_eager, is_cut
from zoo_models import CASES, REFUSED

import hocket
from hocket.compiler.plan.tactics import TensorParallel, Zero
from hocket.errors import CaptureError, ProgramError

MESHES = {"d=2": "auto", "tp=4": [TensorParallel("tp")], "dp=2,tp=2": [Zero("dp"), TensorParallel("tp")]}

QUICK = (
    ("changed_input", "d=2"),
    ("uneven_sizes", "dp=2,tp=2"),
    ("tied_weights", "dp=2,tp=2"),
    ("activation_checkpointing", "tp=4"),
    ("custom_autograd_function", "d=2"),
    ("weight_norm", "tp=4"),
    ("outputs_that_are_inputs_and_parameters", "d=2"),
    ("gradient_inside_the_forward", "d=2"),
    ("autocast_bfloat16", "tp=4"),
    ("frozen_parameter", "dp=2,tp=2"),
    ("convolutions", "d=2"),
    ("batch_norm", "dp=2,tp=2"),
    ("dropout", "d=2"),
    ("encoder_layer", "tp=4"),
    ("routed_experts", "d=2"),
    ("complex_rotary", "d=2"),
    ("causal_grouped_attention", "dp=2,tp=2"),
    ("embedding_bag", "d=2"),
    ("cross_entropy_with_ignored_targets", "d=2"),
    ("llama", "tp=4"),
    ("gpt2", "d=2"),
)
"""A case of every kind, on one mesh each; all on all of them are slow."""


@pytest.mark.parametrize(("name", "mesh"), QUICK)
def test_a_model_of_every_kind_is_cut_and_equals_eager(name: str, mesh: str) -> None:
    assert is_cut(assert_like_eager(CASES[name], mesh, "sim", MESHES[mesh]))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", CASES)
def test_every_model_is_cut_and_equals_eager_on_every_mesh(name: str, mesh: str) -> None:
    assert is_cut(assert_like_eager(CASES[name], mesh, "sim", MESHES[mesh]))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if r.slow else n for n, r in REFUSED.items()])
def test_what_has_no_single_graph_is_refused_with_its_line_and_the_way_out(name: str) -> None:
    refused = REFUSED[name]
    model, args, kwargs = refused.build()
    with pytest.raises((CaptureError, ProgramError)) as caught:
        hocket.parallelize(model, "tp=2", args, kwargs, engine="sim", verify="off")
    assert refused.line in str(caught.value)
    assert refused.way_out in str(caught.value)
