"""The module that parallelize returns behaves like the module it was given."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hocket
from hocket.errors import InputError


class Mlp(nn.Module):
    """Two linears and a buffer; returns a dict with a non-tensor in it."""

    scale: Tensor

    def __init__(self, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor, *, shift: float = 0.0) -> dict[str, object]:
        y = self.down(F.gelu(self.up(x))) * self.scale + shift
        return {"y": y, "rows": x.shape[0]}


@pytest.fixture
def pair() -> tuple[Mlp, Mlp]:
    """(the model to parallelize, an eager copy)."""
    torch.manual_seed(0)
    model = Mlp()
    return model, copy.deepcopy(model)


def parallel(model: nn.Module, mesh: str = "tp=2", **options: object) -> nn.Module:
    return hocket.parallelize(model, mesh, engine="sim", **options)  # type: ignore[arg-type]


def test_outputs_losses_outside_and_gradients_match_eager(pair: tuple[Mlp, Mlp]) -> None:
    model, eager = pair
    with parallel(model, example_args=(torch.randn(4, 8),)) as m:
        x = torch.randn(4, 8)
        got, want = m(x, shift=1.5), eager(x, shift=1.5)
        assert got["rows"] == 4
        torch.testing.assert_close(got["y"], want["y"])
        got["y"].square().mean().backward()
        want["y"].square().mean().backward()
        for (name, p), q in zip(m.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_training_with_an_ordinary_optimizer_follows_eager(pair: tuple[Mlp, Mlp]) -> None:
    model, eager = pair
    with parallel(model) as m:
        optimizers = [torch.optim.AdamW(x.parameters(), lr=1e-2) for x in (m, eager)]
        for _ in range(4):
            x = torch.randn(4, 8)
            for net, optimizer in zip((m, eager), optimizers, strict=True):
                optimizer.zero_grad()
                for half in x.chunk(2):  # gradients accumulate
                    net(half)["y"].square().mean().backward()
                nn.utils.clip_grad_norm_(net.parameters(), 0.5)
                optimizer.step()
        for p, q in zip(m.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_names_state_signature_and_class_are_the_users(pair: tuple[Mlp, Mlp]) -> None:
    model, eager = pair
    with parallel(model) as m:
        assert isinstance(m, Mlp)
        assert inspect.signature(m.forward) == inspect.signature(eager.forward)
        assert list(m.state_dict()) == list(eager.state_dict())
        other = Mlp()
        other.load_state_dict(m.state_dict())
        m.load_state_dict(eager.state_dict())
        x = torch.randn(2, 8)
        torch.testing.assert_close(m(x)["y"], other(x)["y"])


def test_a_checkpoint_loaded_afterwards_is_used(pair: tuple[Mlp, Mlp]) -> None:
    model, _ = pair
    with parallel(model, example_args=(torch.randn(4, 8),)) as m:
        x = torch.randn(4, 8)
        m.load_state_dict(Mlp().state_dict(), assign=True)
        torch.testing.assert_close(m(x)["y"], model(x)["y"])
        other = Mlp()
        m.load_state_dict(other.state_dict())
        torch.testing.assert_close(m(x)["y"], other(x)["y"])
        m.load_state_dict(Mlp().state_dict(), assign=True)
        torch.testing.assert_close(m(x)["y"], model(x)["y"])


def test_inference_and_eval_mode_take_their_own_program(pair: tuple[Mlp, Mlp]) -> None:
    model, eager = pair
    with parallel(nn.Sequential(model.up, nn.Dropout(0.5))) as m:
        x = torch.randn(4, 8)
        m.eval()
        with torch.no_grad():
            y = m(x)
        assert not y.requires_grad
        torch.testing.assert_close(y, eager.up(x))
        m.train()
        assert (m(x) == 0).any(), "dropout must be active again in training mode"


def test_frozen_parameters_get_no_gradient(pair: tuple[Mlp, Mlp]) -> None:
    model, _ = pair
    model.up.weight.requires_grad_(requires_grad=False)
    with parallel(model) as m:
        m(torch.randn(4, 8))["y"].sum().backward()
        assert m.up.weight.grad is None
        assert m.up.bias.grad is not None


def test_gradient_of_an_input_flows_out(pair: tuple[Mlp, Mlp]) -> None:
    model, eager = pair
    with parallel(model) as m:
        x, z = (torch.ones(4, 8, requires_grad=True) for _ in range(2))
        m(2 * x)["y"].sum().backward()
        eager(2 * z)["y"].sum().backward()
        torch.testing.assert_close(x.grad, z.grad)


def test_an_input_changed_in_place_is_changed_for_the_caller() -> None:
    class Cached(nn.Linear):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            y = super().forward(x) * cache.clone()
            cache.copy_(x.detach())
            return y

    torch.manual_seed(0)
    model = Cached(8, 8)
    eager = copy.deepcopy(model)
    with parallel(model) as m:
        x, mine, theirs = torch.randn(4, 8), torch.ones(4, 8), torch.ones(4, 8)
        for _ in range(2):
            m(x, mine).square().sum().backward()
            eager(x, theirs).square().sum().backward()
            assert torch.equal(mine, x)
        torch.testing.assert_close(m.weight.grad, eager.weight.grad)
        with torch.no_grad():
            m(2 * x, mine)
        assert torch.equal(mine, 2 * x)


def test_batchnorm_statistics_are_updated_in_the_users_process() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    eager = copy.deepcopy(model)
    with parallel(model) as m:
        for _ in range(2):
            x = torch.randn(6, 8)
            m(x)
            eager(x)
        for (name, got), want in zip(m.named_buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(got, want, msg=name)


def test_a_parameter_changed_between_forward_and_backward_is_refused(pair: tuple[Mlp, Mlp]) -> None:
    model, _ = pair
    with parallel(model) as m:
        loss = m(torch.randn(4, 8))["y"].sum()
        with torch.no_grad():
            m.up.weight.add_(1)
        with pytest.raises(InputError, match=r"up\.weight was changed in place"):
            loss.backward()


def test_a_second_backward_is_refused(pair: tuple[Mlp, Mlp]) -> None:
    model, _ = pair
    with parallel(model) as m:
        loss = m(torch.randn(4, 8))["y"].sum()
        loss.backward(retain_graph=True)
        with pytest.raises(InputError, match="second time"):
            loss.backward()


def test_copies_pickles_and_calls_after_close_say_what_to_do(pair: tuple[Mlp, Mlp]) -> None:
    model, _ = pair
    m = parallel(model, example_args=(torch.randn(4, 8),))
    with pytest.raises(InputError, match="copy the module that was given"):
        copy.deepcopy(m)
    with pytest.raises(InputError, match="state_dict"):
        pickle.dumps(m)
    m.close()
    with pytest.raises(InputError, match="closed"):
        m(torch.randn(4, 8))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "net"}, "nn.Module"),
        ({"mesh": "tp"}, "NAME=SIZE"),
        ({"mesh": 0}, "sizes >= 1"),
        ({"engine": "cluster"}, "engine"),
        ({"tactics": "fast"}, "tactics"),
        ({"constraints": {"nothing.*": {"tp": "R"}}, "example_args": (torch.randn(4, 8),)}, "nothing"),
    ],
)
def test_bad_arguments_are_refused_at_the_door(arguments: dict[str, object], words: str) -> None:
    defaults: dict[str, object] = {"model": Mlp(), "mesh": "tp=2", "engine": "sim"}
    with pytest.raises(hocket.errors.HocketError, match=words):
        hocket.parallelize(**{**defaults, **arguments})  # type: ignore[arg-type]


def test_the_decorator_compiles_on_the_first_call() -> None:
    @hocket.parallel(mesh="tp=2", engine="sim")
    class Net(Mlp):
        """Decorated."""

    torch.manual_seed(0)
    net = Net(8, hidden=16)
    torch.manual_seed(0)
    eager = Mlp(8, 16)
    x = torch.randn(4, 8)
    torch.testing.assert_close(net(x)["y"], eager(x)["y"])
    assert isinstance(net, Mlp)
    net.close()
