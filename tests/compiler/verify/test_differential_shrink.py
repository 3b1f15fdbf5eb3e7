"""Small sizes speak for large ones only if the programs are the same but for integers that are expressions of the sizes."""

import pytest
import torch
from torch import nn

from hocket.compiler.capture import capture
from hocket.compiler.errors import InputError
from hocket.compiler.program import Program
from hocket.compiler.verify.shrink import fit, integer_difference, skeleton_difference


class Fold(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, d = x.shape
        return torch.relu(x.view(b * s, d)).view(b, s * d).softmax(-1)


def at(b: int, s: int, d: int) -> Program:
    program = capture(Fold(), (torch.randn(b, s, d),), train=False)
    return program.replace(sizes={"B": b, "S": s, "D": d})


def test_programs_at_other_sizes_have_one_skeleton_and_their_integers_are_expressions_of_the_sizes() -> None:
    programs = [at(2, 3, 5), at(3, 5, 4), at(4, 7, 6), at(64, 128, 512)]
    assert skeleton_difference(programs[0], programs[3]) == ""
    assert integer_difference(programs) == ""


def test_a_size_that_is_no_expression_of_the_named_ones_is_found() -> None:
    programs = [at(2, 3, 5), at(3, 5, 4), at(4, 7, 6), at(64, 128, 512)]
    view = next(node for node in programs[3].nodes if "view" in node.name)
    view.args = (view.args[0], [8191, 512])
    assert "which is no expression of the sizes" in integer_difference(programs)


def test_another_op_is_another_skeleton() -> None:
    first, second = at(2, 3, 5), at(3, 4, 5)
    next(node for node in second.nodes if node.target is torch.ops.aten.relu.default).target = torch.ops.aten.tanh.default
    assert "relu" in skeleton_difference(first, second)


def test_another_constant_is_another_skeleton() -> None:
    def scaled(factor: float) -> Program:
        return capture(lambda x: x * factor, (torch.randn(3),), train=False)

    assert "arguments of" in skeleton_difference(scaled(0.5), scaled(0.25))
    assert skeleton_difference(scaled(0.5), scaled(0.5)) == ""


@pytest.mark.parametrize(
    ("values", "text"), [([6, 20, 42], "A*B"), ([7, 21, 43], "A*B + 1"), ([1, 2, 3], "A/2"), ([4, 16, 36], "A**2")]
)
def test_expressions_are_fitted_and_named(values: list[int], text: str) -> None:
    sizes = [{"A": 2, "B": 3}, {"A": 4, "B": 5}, {"A": 6, "B": 7}]
    assert str(fit(sizes, values)) == text


def test_two_points_prove_nothing() -> None:
    with pytest.raises(InputError, match="at least 3 programs"):
        integer_difference([at(2, 3, 5), at(3, 5, 4)])
