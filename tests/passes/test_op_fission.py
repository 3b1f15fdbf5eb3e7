"""Weight gradients get nodes of their own, and not a bit changes."""

from __future__ import annotations

import pytest
import torch
from split_support import assert_same, context, held_by, random_inputs, run
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.errors import VerificationError
from hocket.compiler.passmanager import run_passes
from hocket.compiler.program import Program, Role, RoleKind, output_node
from hocket.passes.op_fission import MASKED, OpFission, mask_of

CASES = {
    "convolution": lambda: (nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 6, 6, requires_grad=True)),
    "transposed convolution": lambda: (nn.ConvTranspose1d(3, 4, 3, groups=1), torch.randn(2, 3, 6, requires_grad=True)),
    "batch norm": lambda: (nn.BatchNorm1d(3), torch.randn(4, 3, 5, requires_grad=True)),
    "group norm": lambda: (nn.GroupNorm(2, 4), torch.randn(2, 4, 5, requires_grad=True)),
    "layer norm": lambda: (nn.LayerNorm(6), torch.randn(4, 6, requires_grad=True)),
}


def captured(name: str) -> tuple[Program, dict[Role, torch.Tensor]]:
    torch.manual_seed(0)
    module, x = CASES[name]()
    program = capture(module, (x,))
    return program, {**held_by(program, module), **random_inputs(program, 1), Role(RoleKind.INPUT, "args[0]"): x.detach()}


@pytest.mark.parametrize("name", CASES)
def test_every_op_with_a_mask_is_split_in_two_and_stays_bitwise_equal(name: str) -> None:
    program, given = captured(name)
    (before,) = [node for node in program.nodes if node.target in MASKED]
    split, records = run_passes(program, (OpFission(),), context(), level="ring")
    after = [node for node in split.nodes if node.target is before.target]
    assert [mask_of(node) for node in after] == [[False, *mask_of(before)[1:]], [True, False, False]]
    assert records[0].applied == 1
    assert_same(run(split, given), run(program, given))


def test_an_op_that_gives_one_kind_of_gradient_stays_whole_and_says_why() -> None:
    program = capture(nn.LayerNorm(6), (torch.randn(4, 6),))  # the input needs no gradient
    split = OpFission()(program, context())
    (decision,) = [one for one in split.decisions if one.by == "op-fission"]
    assert not decision.applied
    assert decision.reason == "the backward of a layer norm gives one kind of gradient only: nothing to split"
    assert decision.source


def test_a_gradient_from_the_wrong_half_is_refused() -> None:
    class Swapped(OpFission):
        def __call__(self, program, context):
            new = super().__call__(program, context)
            output = output_node(new.graph.graph)
            first, *gradients = output.args[0]
            swapped = [gradients[1], gradients[0], *gradients[2:]]
            output.args = ((first, *swapped),)
            return new

    program = capture(nn.LayerNorm(6), (torch.randn(4, 6, requires_grad=True),))
    with pytest.raises(VerificationError):
        run_passes(program, (Swapped(),), context(), level="ring")
