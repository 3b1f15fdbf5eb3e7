"""What is known of a network that is sampled: which of its parts a window can change, found once and kept with the network.

A network of affine and pointwise layers is cut into units, a convolutional one into rows of its images; any other is evaluated
whole, with the reason why. Parameters that depend on a position drawn later are refused, by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..capture import capture
from ..errors import HocketError, InputError
from ..program import Program
from .image_layers import find_regions
from .regions import RegionNet, Regions
from .slices import SlicedNet
from .units import ROWS, Units, UnsliceableError, find_units

KEPT_NETS = 4
"""Prepared evaluators that a network keeps, one for each number of rows."""


class DenseNet:
    """A network that is evaluated whole; the same interface as SlicedNet."""

    def __init__(self, cond: Callable[[Tensor], Tensor], order: Tensor, rows: int, like: Tensor) -> None:
        self.inputs = like.new_zeros(rows, len(order))
        self._cond = cond
        self._order = order
        self._place = order.argsort()
        self._window = (0, 0)

    def begin(self, start: int, end: int) -> None:
        """Move to the window of places ``[start, end)``."""
        self._window = (start, end)

    def parameters(self) -> Tensor:
        """The parameters of the window's places."""
        return self._cond(self.inputs[:, self._place])[:, self._order[slice(*self._window)]]

    def settle(self, place: int) -> None:
        """Nothing is kept."""


@dataclass
class Network:
    """What was found out about a network: its units or image rows, or why there are none; places settled per second by window and
    rows; networks that are prepared for so many rows and idle; its weights, held so that no new one can be taken for an old one."""

    versions: tuple[tuple[int, ...], ...]
    order: Tensor
    parts: Units | Regions | None
    reason: str
    rates: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    nets: dict[int, SlicedNet] = field(default_factory=dict)
    weights: tuple[Tensor, ...] = ()


_NETWORKS: weakref.WeakKeyDictionary[nn.Module, Network] = weakref.WeakKeyDictionary()


def network_of(cond: nn.Module, places: Tensor, ranks: Tensor, like: Tensor) -> Network:
    """What is known of a network with its present weights. like: a tensor of its dtype, on its device."""
    weights = (*cond.parameters(), *cond.buffers())
    versions = tuple((id(t), t.data_ptr(), t._version) for t in weights)
    known = _NETWORKS.get(cond)
    if known is None or known.versions != versions or not torch.equal(known.order, torch.stack((places, ranks))):
        known = _NETWORKS[cond] = _analysed(cond, places, ranks, like)
        known.versions, known.order, known.weights = versions, torch.stack((places, ranks)), weights
    return known


def _analysed(cond: nn.Module, places: Tensor, ranks: Tensor, like: Tensor) -> Network:
    example = like.new_zeros(ROWS, len(places))
    out = cond(example)
    if not isinstance(out, Tensor) or out.shape[:2] != example.shape:
        found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"cond must return parameters [rows, positions, ...], here [{ROWS}, {len(places)}, ...]; found {found}")
    firsts = torch.searchsorted(ranks, ranks)  # the first place of each place's group
    if example.device.type != "cpu":
        _check_causal(cond, example, places, firsts)
        return Network((), places, None, f"slices of it are evaluated on CPUs only, and it is on {example.device}")
    try:
        program = capture(cond, (example,), train=False)
        tensors = {**dict(cond.named_parameters(remove_duplicate=False)), **dict(cond.named_buffers(remove_duplicate=False))}
        if any(node.target is torch.ops.aten.convolution.default for node in program.nodes):
            _check_causal(cond, example, places, firsts)
            return Network((), places, _regions(program, tensors, places, firsts), "")
        units = find_units(program, tensors, places.argsort())
    except (UnsliceableError, HocketError) as error:
        _check_causal(cond, example, places, firsts)
        return Network((), places, None, str(error).partition("\n")[0])
    ordered = Units(units.banks, units.outputs[places], units.shape)
    late = (ordered.degree_of_outputs() >= firsts).nonzero().flatten().tolist()
    if late:
        reads = int(ordered.degree_of_outputs()[late[0]])
        raise InputError(_not_causal(int(places[late[0]]), int(places[reads])))
    return Network((), places, ordered, "")


def _regions(program: Program, tensors: dict[str, Tensor], places: Tensor, firsts: Tensor) -> Regions:
    """The rows of the image that a convolutional network works on, one row after the other."""
    in_order = torch.arange(len(places))
    if not (torch.equal(places, in_order) and torch.equal(firsts, in_order)):
        raise UnsliceableError("convolutions are followed for pixels drawn row by row only, one at a time")
    return find_regions(program, tensors, len(places))


def evaluator(known: Network, cond: nn.Module, rows: int, like: Tensor) -> SlicedNet | RegionNet | DenseNet:
    """What evaluates the network for windows of a batch of so many rows."""
    match known.parts:
        case Units():
            net = known.nets.pop(rows, None) or SlicedNet(known.parts, rows, like.dtype)
            net.restart()
            return net
        case Regions():
            return RegionNet(known.parts, rows, like.dtype)
    return DenseNet(cond, known.order[0], rows, like)


def _check_causal(cond: nn.Module, example: Tensor, places: Tensor, firsts: Tensor) -> None:
    """Change some positions and see that no parameters generated up to then change. A sample of them: a check, not a proof."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(example.shape, generator=generator).to(example)
    expected = cond(base)[:, places]
    for place in torch.randint(len(places), (8,), generator=generator).tolist():
        changed = base.clone()
        changed[:, places[place]] += 1.0
        moved = (cond(changed)[:, places] != expected).reshape(ROWS, len(places), -1).any(dim=2).any(dim=0).cpu()
        early = (moved & (firsts <= place)).nonzero().flatten().tolist()
        if early:
            raise InputError(_not_causal(int(places[early[0]]), int(places[place])))


def _not_causal(position: int, later: int) -> str:
    return (
        f"cond's parameters of position {position} depend on position {later}, which is not generated before it; "
        "give the order the network was made for as order="
    )
