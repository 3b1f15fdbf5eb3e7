"""Every model of the zoo: its backward split, and cut into stages run in a random order, changes no bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree
from zoo_models import CASES

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))

from split_support import PipelineRun, assert_same, context, even_stages, held_by, random_inputs, sequential

from hocket.compiler.capture import capture
from hocket.passes.backward_split import BackwardSplit
from hocket.passes.pipeline import cut_stages

QUICK = ("batch_norm", "cell_loop", "convolutions", "dropout", "one_block_called_twice", "weight_norm", "frozen_parameter")
REFUSED = {"changed_input"}  # writes into its input, which a pipeline cannot hand back


@pytest.fixture(autouse=True)
def sums_in_a_fixed_order() -> Iterator[None]:
    """Let torch add up repeated indices in order: on several threads plain PyTorch is else not equal to itself."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def _check(name: str, stages: int) -> None:
    model, args, kwargs = CASES[name].make()
    program = capture(model, args, kwargs)
    held = held_by(program, model)
    leaves = pytree.tree_leaves((args, kwargs))
    places = enumerate(program.signature.in_leaves)
    given = {program.signature.inputs[place]: leaves[i].detach() for i, place in places if isinstance(place, int)}
    batches = [{**given, **random_inputs(program, k)} for k in range(2)]
    split = BackwardSplit(worth=0)(program, context())
    each, sums = sequential(program, held, batches)
    found, split_sums = sequential(split, held, batches)
    for one, other in zip(found, each, strict=True):
        assert_same(one, other)
    assert_same(split_sums, sums)
    pipeline = cut_stages(split, even_stages(split, stages))
    found, shares = PipelineRun(pipeline, held, batches).run(random.Random(0))
    for one, other in zip(found, each, strict=True):
        assert_same(one, other)
    shared = {group.parameter for group in pipeline.tied}
    assert_same(*({role: value for role, value in each.items() if role.name not in shared} for each in (shares, sums)))
    for role, value in sums.items():
        torch.testing.assert_close(shares[role], value)


@pytest.mark.parametrize("name", QUICK)
def test_models_of_every_kind_are_split_and_cut_without_changing_a_bit(name: str) -> None:
    _check(name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_every_model_is_split_and_cut_without_changing_a_bit(name: str, stages: int) -> None:
    """Llama, BERT, Mamba, ResNet and an LSTM cell in a loop among them."""
    _check(name, stages)
