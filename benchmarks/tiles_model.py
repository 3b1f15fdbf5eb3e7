"""Programs, clusters and simulated machines for the benchmark of tile loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx
from tiles_ranks import AXIS
from torch._subclasses.fake_tensor import FakeTensorMode

from hocket.compiler.contract import Context
from hocket.compiler.cost.calibrate import calibrate
from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.cost.tile_timing import LoopTimer
from hocket.compiler.cost.timing import CollectiveTimer
from hocket.compiler.layout import Shard
from hocket.compiler.program import NOTE, Note, Program, Role, RoleKind, Signature
from hocket.compiler.rules.table import RuleTable
from hocket.compiler.tiles import TileLoop, is_tile_loop, loop_of
from hocket.passes.tiles.fuse import FuseTiles
from hocket.runtime.engines.local import LocalEngine
from hocket.runtime.mesh import Mesh

c10d = torch.ops._c10d_functional


def calibrated() -> Cluster:
    """This machine as ``hocket calibrate`` sees it."""
    with LocalEngine(Mesh(((AXIS, 2),)), threads=1) as engine:
        return calibrate(CollectiveTimer(engine), LoopTimer(engine), dtypes=(torch.float32, torch.bfloat16))


def product_program(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, parts: int) -> Program:
    """The lowered program of one product and its collective."""
    m, k, n = shape
    graph, mode = fx.Graph(), FakeTensorMode()

    def noted(node: fx.Node, *size: int) -> fx.Node:
        with mode:
            node.meta["val"] = torch.empty(size, dtype=dtype)
        node.meta[NOTE] = Note(source="benchmark", layouts=((Shard(0),),), global_shapes=((size[0] * parts, *size[1:]),))
        return node

    gathers = kind == "all_gather"
    x = noted(graph.placeholder("x"), *((m // parts, k) if gathers else (m, k // parts)))
    w = noted(graph.placeholder("w"), *((k, n // parts) if gathers else (k // parts, n)))

    def sent(value: fx.Node, *size: int) -> fx.Node:
        args = {"all_gather": (parts, AXIS), "reduce_scatter": ("sum", parts, AXIS), "all_reduce": ("sum", AXIS)}[kind]
        name = {"all_gather": "all_gather_into_tensor", "reduce_scatter": "reduce_scatter_tensor"}.get(kind, kind)
        started = noted(graph.call_function(getattr(c10d, name).default, (value, *args)), *size)
        return noted(graph.call_function(c10d.wait_tensor.default, (started,)), *size)

    if gathers:
        out = noted(graph.call_function(torch.ops.aten.mm.default, (sent(x, m, k), w)), m, n // parts)
    else:
        y = noted(graph.call_function(torch.ops.aten.mm.default, (x, w)), m, n)
        out = sent(y, m // parts if kind == "reduce_scatter" else m, n)
    graph.output((out,))
    roles = tuple(Role(RoleKind.INPUT, name) for name in "xw")
    return Program(
        fx.GraphModule(torch.nn.Module(), graph), Signature(roles, (Role(RoleKind.OUTPUT, "y"),)), mesh=Mesh(((AXIS, parts),))
    )


def is_fused(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, cluster: Cluster, rules: RuleTable) -> bool:
    """Whether the pass makes a loop of a product, for ``cluster``."""
    program = product_program(kind, shape, dtype, 2)
    assert program.mesh is not None
    return any(map(is_tile_loop, FuseTiles()(program, Context(program.mesh, rules, cluster)).nodes))


def chosen_form(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype, cluster: Cluster, rules: RuleTable
) -> tuple[TileLoop, float]:
    """The loop that the pass makes of a product whatever it gains, and the seconds it predicts."""
    program = product_program(kind, shape, dtype, 2)
    assert program.mesh is not None
    fused = FuseTiles(least_gain=-1e9)(program, Context(program.mesh, rules, cluster))
    (node,) = [node for node in fused.nodes if is_tile_loop(node)]
    (text,) = [d.reason for d in fused.decisions if d.applied]
    return loop_of(node), float(text.split(" -> ")[1].split(" us")[0]) * 1e-6


@dataclass(frozen=True)
class Sublayer:
    """A product of T3's table: rows, contracted and output sizes of one rank, and where it stands."""

    model: str
    name: str
    parts: int
    rows: int
    inner: int
    outer: int


def sublayers() -> list[Sublayer]:
    """OP, FC-2 forward, FC-1, IP backward of Mega-GPT-2 (hidden 3072, 16,384 tokens) and T-NLG (hidden 4256, 8,192 tokens)."""
    found = []
    for model, hidden, tokens in (("Mega-GPT-2", 3072, 16384), ("T-NLG", 4256, 8192)):
        for parts in (8, 16):
            inner = {"OP": hidden // parts, "FC-2": 4 * hidden // parts, "FC-1": 4 * hidden // parts, "IP": 3 * hidden // parts}
            found += [Sublayer(model, name, parts, tokens, size, hidden) for name, size in inner.items()]
    return found


TILES = (1, 2, 4, 8)
"""Tiles a chunk that are tried."""


@dataclass(frozen=True)
class Device:
    """A stated device and link: multiply-adds as flops per second, bytes per second and seconds of the ring in one direction."""

    flops: float = 2.0e13
    link: float = 7.5e10
    delay: float = 5e-7


def sublayer_seconds(layer: Sublayer, efficiency: Mapping[int, float], device: Device) -> dict[str, float]:
    """The sublayer apart, as an ideal overlap, and as the best tile loop, each followed by the same all-gather.

    efficiency: rows -> speed of a product of so many rows relative to that of all rows, measured.
    """
    whole = 2.0 * layer.rows * layer.inner * layer.outer / device.flops
    chunk_bytes = 2.0 * layer.rows * layer.outer / layer.parts
    hop = device.delay + chunk_bytes / device.link
    scatter, gather = (layer.parts - 1) * hop, (layer.parts - 1) * hop
    loops = []
    for tiles in TILES:
        each = whole / layer.parts / tiles / efficiency[layer.rows // layer.parts // tiles]
        loops.append(_ring(layer.parts, [each] * tiles, chunk_bytes / device.link / tiles, device.delay))
    return {"apart": whole + scatter + gather, "ideal": max(whole, scatter) + gather, "loop": min(loops) + gather}


def _ring(parts: int, tiles: list[float], wire: float, delay: float) -> float:
    """Seconds of product -> reduce_scatter on a ring: a tile is added to what the neighbour sent of it one step before."""
    clock = free = 0.0
    arrived = [0.0] * len(tiles)
    for step in range(parts):
        for tile, compute in enumerate(tiles):
            clock = max(clock, arrived[tile]) + compute
            if step < parts - 1:
                free = max(free, clock) + wire
                arrived[tile] = free + delay
    return clock
