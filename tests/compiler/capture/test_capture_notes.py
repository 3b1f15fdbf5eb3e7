"""Every node says which line and submodule of the user's it came from, backward nodes included."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hocket.compiler.capture import capture
from hocket.compiler.program import Phase, RoleKind, note

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.gelu(self.up(x))
        return x + self.down(h)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x).softmax(-1)


def test_backward_nodes_carry_the_line_of_their_forward_node() -> None:
    program = capture(Model(), (torch.randn(4, 8),))
    for forward, backward in (
        (aten.gelu.default, aten.gelu_backward.default),
        (aten._softmax.default, aten._softmax_backward_data.default),
    ):
        (a,) = (node for node in program.nodes if node.target is forward)
        (b,) = (node for node in program.nodes if node.target is backward)
        assert note(a).source == note(b).source
        assert note(a).source.startswith("test_capture_notes.py:")
        assert note(a).module == note(b).module
        assert (note(a).phase, note(b).phase) == (Phase.FORWARD, Phase.BACKWARD_INPUT)
    (gelu,) = (node for node in program.nodes if node.target is aten.gelu.default)
    assert note(gelu).source.endswith("h = F.gelu(self.up(x))")
    assert note(gelu).module == "block"


def test_no_computed_node_lacks_a_source_or_an_origin() -> None:
    for train in (True, False):
        program = capture(Model(), (torch.randn(4, 8),), train=train)
        for node in program.nodes:
            if node.op == "call_function":
                assert note(node).source, node
                assert note(node).module.startswith(("block", "")), node
                assert note(node).origin == node.name


def test_submodule_and_weight_gradient_agree() -> None:
    program = capture(Model(), (torch.randn(4, 8),))
    gradient = program.results[program.signature.outputs_of(RoleKind.GRADIENT)["block.down.weight"]]
    assert note(gradient).module == "block.down"
    assert note(gradient).source.endswith("return x + self.down(h)")


def test_torch_modules_without_a_line_are_named() -> None:
    program = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.randn(4, 8),))
    assert {note(node).source for node in program.nodes if node.op == "call_function"} == {"0: Linear", "1: ReLU"}


def test_the_forward_phase_never_depends_on_tangents() -> None:
    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda t: t.sin().exp(), x, use_reentrant=False)

    program = capture(checkpointed, (torch.randn(4, 8, requires_grad=True),))
    tainted = {node for node in program.placeholders if note(node).role.kind is RoleKind.TANGENT}
    for node in program.nodes:
        if tainted.intersection(node.all_input_nodes):
            tainted.add(node)
            assert node.op == "output" or note(node).phase is Phase.BACKWARD_INPUT
    sines = [note(node) for node in program.nodes if node.target is aten.sin.default]
    assert [n.phase for n in sines] == [Phase.FORWARD, Phase.BACKWARD_INPUT], "recomputation belongs to the backward"
    assert len({n.source for n in sines}) == 1


def test_placeholders_carry_their_roles_in_order() -> None:
    program = capture(Model(), (torch.randn(4, 8),))
    assert tuple(note(node).role for node in program.placeholders) == program.signature.inputs
