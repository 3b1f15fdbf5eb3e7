"""torch's ``scan`` and ``while_loop`` are chains in a captured program: the loop's values and gradients."""

import pytest
import torch
import torch._higher_order_ops.utils as operators
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

import hocket
from hocket.compiler.program import Program
from hocket.compiler.verify.lockstep import run_global
from hocket.errors import CaptureError

WEIGHT = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) / 3


class Scanned(nn.Module):
    """A recurrence with a carry of two, given as a dictionary, and an output beside it."""

    def __init__(self, *, dim: int = 0, reverse: bool = False, plain: bool = False) -> None:
        super().__init__()
        self.weight, self.dim, self.reverse, self.plain = nn.Parameter(WEIGHT.clone()), dim, reverse, plain

    def step(self, carry: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        new = torch.tanh(x + carry["h"] @ self.weight)
        return {"h": new, "sum": carry["sum"] + new}, new * 2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start = x.new_zeros(2, 4)
        carry: dict[str, Tensor] = {"h": start, "sum": start + 1}
        if not self.plain:
            carry, out = scan(self.step, carry, x, dim=self.dim, reverse=self.reverse)
            return carry["h"], carry["sum"], out
        outs = []
        pieces = x.unbind(self.dim)
        for piece in pieces[::-1] if self.reverse else pieces:
            carry, out = self.step(carry, piece)
            outs.append(out)
        return carry["h"], carry["sum"], torch.stack(outs[::-1] if self.reverse else outs, self.dim)


def chains(program: Program) -> int:
    return sum("hocket.chain" in str(n.target) for n in program.nodes)


@pytest.mark.parametrize(("dim", "reverse"), [(0, False), (1, True)])
def test_scan_is_one_node_with_the_loops_values_and_gradients(dim: int, reverse: bool) -> None:
    x = torch.randn(6, 2, 4) if dim == 0 else torch.randn(2, 6, 4)
    program = hocket.capture(Scanned(dim=dim, reverse=reverse), (x,))
    plain = hocket.capture(Scanned(dim=dim, reverse=reverse, plain=True), (x,))
    assert chains(program) == 2  # forward and adjoint
    assert chains(plain) == 0
    generator = torch.Generator().manual_seed(1)
    given = {
        role: torch.randn(node.meta["val"].shape, generator=generator)
        for role, node in zip(program.signature.inputs, program.placeholders, strict=True)
    }
    expected, found = (run_global(p, given, torch.float64).outputs for p in (plain, program))
    for role, value in expected.items():
        if value is not None:
            torch.testing.assert_close(found[role], value, rtol=1e-12, atol=1e-12)


def run(model: object, x: Tensor) -> Tensor:
    program = hocket.capture(model, (x,), train=False)  # type: ignore[arg-type]
    assert chains(program) <= 1
    given = [program.constants.get(role.name, x) for role in program.signature.inputs]
    (result,) = torch.fx.Interpreter(program.graph).run(*given, enable_io_processing=False)
    return result


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_a_loop_that_integers_count_is_a_chain_over_their_values(steps: int) -> None:
    def model(x: Tensor) -> Tensor:
        i, j, y = while_loop(lambda i, j, y: i < steps, lambda i, j, y: (i + 1, j - 2, y * 0.5 + i - j), (0, 7, x))
        return y + i + j

    x = torch.randn(3)
    expected, j = x, 7
    for i in range(steps):
        expected, j = expected * 0.5 + i - j, j - 2
    torch.testing.assert_close(run(model, x), expected + steps + j)


@pytest.mark.parametrize(
    ("cond", "body", "message"),
    [
        (lambda i, x: x.sum() < 3, lambda i, x: (i + 1, x + 1), "decided by the values of tensors"),
        (lambda i, x: i < 99, lambda i, x: (i * 2, x + 1), "the same amount"),
        (lambda i, x: i < 3, lambda i, x: (i + 1, x + torch.rand_like(x)), "random numbers"),
        (lambda i, x: i > 0, lambda i, x: (i + 1, x + 1), "still holds after"),
    ],
)
def test_loops_that_cannot_be_counted_are_refused_with_the_way_out(cond: object, body: object, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        hocket.capture(lambda x: while_loop(cond, body, (1, x))[1], (torch.randn(3),), train=False)


def test_torch_is_left_as_it_was() -> None:
    before = operators._hop_compile_and_call
    hocket.capture(Scanned(), (torch.randn(3, 2, 4),), train=False)
    assert operators._hop_compile_and_call is before
