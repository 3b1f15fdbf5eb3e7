"""Trace a function as one flat ATen graph, for one rank or for each of several, with the user's line on every node.

Inside a function that is traced for a rank, ``torch.distributed`` behaves as on that rank: the default process group is torch's own
fake one, so nothing is sent, and functional collectives become nodes. That is how algorithms that ask for their rank, and send to
the next one, become graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
import torch.fx as fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from ...runtime.mesh import Mesh
from ..capture.counter_random import CounterRandom
from ..capture.failures import without_torchs_log
from ..capture.recorder import Recorder
from ..capture.sources import SourceFinder
from ..errors import HocketError, InputError
from ..layout import Layout, local_shape, parse_placement, replicated
from ..program import NOTE, note

Mode = Literal["real", "fake"]


def trace_function(function: Callable[..., Any], tensors: Sequence[torch.Tensor], *, fake: bool = True) -> fx.GraphModule:
    """The graph of ``function(*tensors)``, which returns a tensor or a sequence of them.

    Only shapes and dtypes of ``tensors`` count. fake: whether values are hidden from the function. Raises InputError for a function
    that draws random numbers, or fails.
    """

    def run(*flat: Any) -> Any:
        mode = get_proxy_mode()
        assert mode is not None
        finder = SourceFinder({}, entry={run.__code__})
        with Recorder(mode.tracer.graph, finder, CounterRandom(_refuse_random)):
            return function(*flat)

    mode: Mode = "fake" if fake else "real"
    try:
        with without_torchs_log(), torch.autograd.set_multithreading_enabled(False):
            traced = make_fx(run, tracing_mode=mode, _allow_non_fake_inputs=True)(*tensors)
            changes = any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in traced.graph.nodes)
            return _functional(traced, tensors, mode) if changes else traced
    except HocketError:
        raise
    except Exception as error:
        raise InputError(f"the function cannot be traced: {type(error).__name__}: {error}") from error


class _Replay(fx.Interpreter):
    """Runs a graph again while it is traced, and hands its notes on."""

    def __init__(self, module: fx.GraphModule, created: fx.Graph) -> None:
        super().__init__(module)
        self.created = created

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; new nodes carry its note."""
        last = next(iter(reversed(self.created.nodes)), None)
        result = super().run_node(n)
        for node in reversed(self.created.nodes):
            if node is last:
                break
            node.meta.setdefault(NOTE, note(n))
        return result


def _functional(module: fx.GraphModule, tensors: Sequence[torch.Tensor], mode: Mode) -> fx.GraphModule:
    """The same graph without changes in place, which torch's own functionalisation resolves."""

    def run(*flat: Any) -> Any:
        proxies = get_proxy_mode()
        assert proxies is not None
        return _Replay(module, proxies.tracer.graph).run(*flat, enable_io_processing=False)

    wrapped: Callable[..., Any] = torch.func.functionalize(run, remove="mutations")
    with torch.no_grad():
        return make_fx(lambda *flat: wrapped(*flat), tracing_mode=mode, _allow_non_fake_inputs=True)(*tensors)


def _refuse_random() -> NoReturn:
    raise InputError("the function draws random numbers; pass them in as inputs, so that all ranks can be given the same")


def trace_ranks(
    function: Callable[..., Any],
    example_args: Sequence[torch.Tensor],
    mesh: str | int | Mesh,
    *,
    layouts: Mapping[str, Layout | str] | None = None,
) -> list[fx.GraphModule]:
    """One graph a rank of a mesh with one axis, ready for ``hocket.verify(original, graphs, mesh=..., layouts=...)``.

    function: takes a rank's pieces and may ask ``torch.distributed`` for its rank and call functional collectives on the default
    group. example_args: global values, of which only shapes and dtypes count. layouts: of the arguments that are cut, as
    ``{"args[0]": "S(1)"}``. Raises InputError where a process group exists already, or the function cannot be traced.
    """
    shape = Mesh.parse(mesh)
    if len(shape.axes) != 1:
        raise InputError(f"expected a mesh with one axis, found {shape}; other groups need a graph a rank, traced by hand")
    graphs = []
    for rank in range(shape.size):
        pieces = [_piece(value, (layouts or {}).get(f"args[{i}]"), shape, rank) for i, value in enumerate(example_args)]
        with fake_group(rank, shape.size):
            graphs.append(trace_function(function, pieces, fake=False))
    return graphs


def _piece(value: torch.Tensor, layout: Layout | str | None, mesh: Mesh, rank: int) -> torch.Tensor:
    placed = replicated(mesh) if layout is None else (parse_placement(layout),) if isinstance(layout, str) else layout
    return torch.ones(local_shape(tuple(value.shape), placed, mesh, rank), dtype=value.dtype)


@contextlib.contextmanager
def fake_group(rank: int, size: int) -> Iterator[None]:
    """``torch.distributed`` as on one rank of ``size``, without any other."""
    if dist.is_initialized():
        raise InputError("a process group exists already; ranks can be traced only in a process that has none")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
