"""Tile loops on all ranks in one process: the numbers, the orders, and what is wrong with broken schedules."""

from __future__ import annotations

import functools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.runtime.errors import ProgramError, RankHung
from hocket.runtime.executors.rendezvous import group_results
from hocket.runtime.executors.tile_ranks import TogetherLoops
from hocket.runtime.executors.tile_ready import ReadyLoop
from hocket.runtime.executors.tile_whole import run_whole
from hocket.runtime.mesh import Mesh
from hocket.runtime.templates import Site
from hocket.runtime.tile_loop import Call, Cut, Read, Result, TileLoop, narrow, place, read_tile_loop
from hocket.runtime.tile_schedule import Step, check_schedule, steps

MM, ADD, RESHAPE, MUL = "aten.mm.default", "aten.add.Tensor", "aten.reshape.default", "aten.mul.Tensor"


def slot(n: int) -> dict[str, int]:
    return {"slot": n}


def product_into(kind: str, parts: int, rows: int, tiles: int, reduce_op: str = "sum") -> TileLoop:
    """x @ w, whose rows go into a collective."""
    calls = (Call(MM, [slot(0), slot(1)], {}, (2,), False),)
    results = (Result(kind, 2, Cut(0), reduce_op if "reduce" in kind else ""),)
    return TileLoop("tp", parts, rows, tiles, (), (Read("tiled", Cut(0)), Read("whole")), calls, results)


def product_from(kind: str, parts: int, rows: int, tiles: int) -> TileLoop:
    """A gathered or exchanged operand times two weights; the operand itself leaves as well."""
    calls = (Call(MM, [slot(0), slot(1)], {}, (3,), False), Call(MM, [slot(0), slot(2)], {}, (4,), False))
    results = (Result("map", 3, Cut(0)), Result("map", 4, Cut(0)), Result("map", 0, Cut(0)))
    return TileLoop("tp", parts, rows, tiles, (), (Read(kind, Cut(0)), Read("whole"), Read("whole")), calls, results)


def contraction(parts: int, rows: int, tiles: int) -> TileLoop:
    """t(gathered x) @ d: the tiles add up."""
    calls = (Call("aten.t.default", [slot(0)], {}, (2,), False), Call(MM, [slot(2), slot(1)], {}, (3,), False))
    reads = (Read("gather", Cut(0)), Read("tiled", Cut(0)))
    return TileLoop("tp", parts, rows, tiles, (), reads, calls, (Result("sum", 3, None),))


def both_sides(parts: int, rows: int, tiles: int, kind: str = "reduce_scatter") -> TileLoop:
    """gather -> product -> product plus itself, scaled, reshaped -> scattered sum: one loop for a whole layer."""
    calls = (
        Call(MM, [slot(0), slot(1)], {}, (3,), False),
        Call(MUL, [slot(3), slot(3)], {}, (4,), False),
        Call(MM, [slot(4), slot(2)], {}, (5,), False),
        Call(RESHAPE, [slot(5), [{"tile": [0, 0]}, {"n": 1}]], {}, (6,), False),
    )
    results = (Result(kind, 6, Cut(0), "sum"), Result("map", 3, Cut(0)))
    reads = (Read("gather", Cut(0)), Read("whole"), Read("whole"))
    return TileLoop("tp", parts, rows, tiles, (1, 4), reads, calls, results)


def integers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ready(loop: TileLoop) -> ReadyLoop:
    return ReadyLoop(loop, Site.of(Mesh((("tp", loop.parts),)), 0))


def expected(loop: TileLoop, operands: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """The collective before, the region on whole values, the collective after."""
    given = [list(row) for row in operands]
    if loop.fetches is not None:
        column = [row[loop.fetches] for row in operands]
        for rank, row in enumerate(given):
            if loop.reads[loop.fetches].kind == "gather":
                row[loop.fetches] = torch.cat(column)
            else:
                row[loop.fetches] = torch.cat([piece.chunk(loop.parts)[rank] for piece in column])
    body = ready(loop).body(loop.rows)
    found = [body.run(row, {}) for row in given]
    if loop.delivers is not None:
        values = [row[loop.delivers] for row in found]
        total = torch.stack(values).sum(0)
        for rank, row in enumerate(found):
            match loop.results[loop.delivers].kind:
                case "all_reduce":
                    row[loop.delivers] = total
                case "reduce_scatter":
                    row[loop.delivers] = total.chunk(loop.parts)[rank]
                case _:
                    row[loop.delivers] = torch.cat([value.chunk(loop.parts)[rank] for value in values])
    return [[row[n] for n in range(len(loop.results))] for row in found]


def operands_of(loop: TileLoop, seed: int, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    """Random integers; matrices of width 6, then 6 x 4 or whatever the loop multiplies with."""
    found = []
    for rank in range(loop.parts):
        row = []
        for index, read in enumerate(loop.reads):
            shape = (loop.rows, 6) if read.kind in ("tiled", "exchange") else (loop.chunk, 6) if read.kind == "gather" else (6, 4)
            if index == 2 and len(loop.calls) > 3:
                shape = (4, 4)
            row.append(integers(shape, seed * 1000 + rank * 10 + index, dtype))
        found.append(row)
    return found


LOOPS = {
    "scatter": lambda p, r, t: product_into("reduce_scatter", p, r, t),
    "reduce": lambda p, r, t: product_into("all_reduce", p, r, t),
    "send": lambda p, r, t: product_into("all_to_all", p, r, t),
    "gather": lambda p, r, t: product_from("gather", p, r, t),
    "exchange": lambda p, r, t: product_from("exchange", p, r, t),
    "contract": contraction,
    "both": both_sides,
    "both reduced": lambda p, r, t: both_sides(p, r, t, "all_reduce"),
    "scatter, own chunk at once": lambda p, r, t: replace(product_into("reduce_scatter", p, r, t), eager=True, growth=2),
    "reduce, own chunk at once": lambda p, r, t: replace(product_into("all_reduce", p, r, t), eager=True),
    "gather, growing": lambda p, r, t: replace(product_from("gather", p, r, t), growth=3),
    "both, own chunk at once": lambda p, r, t: replace(both_sides(p, r, t), eager=True, growth=2),
}


def assert_bits(found: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(LOOPS)), min_size=1, max_size=4),
    parts=st.integers(2, 5),
    chunk=st.integers(1, 7),
    tiles=st.integers(1, 4),
    order=st.one_of(st.none(), st.integers(0, 1 << 20)),
)
def test_integers_are_bit_equal_in_every_order(names: list[str], parts: int, chunk: int, tiles: int, order: int | None) -> None:
    """Several loops one after the other on the same buffers, under an adversary: the values of the plain program, to the bit."""
    together = TogetherLoops(parts, order)
    for number, name in enumerate(names):
        loop = LOOPS[name](parts, parts * chunk, min(tiles, chunk))
        operands = operands_of(loop, number)
        assert_bits(together.run(ready(loop), operands), expected(loop, operands))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", sorted(LOOPS))
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    loop = LOOPS[name](3, 12, 2)
    operands = [[value.sign() for value in row] for row in operands_of(loop, 5, dtype)]
    found = TogetherLoops(3).run(ready(loop), operands)
    wanted = expected(loop, operands)
    for mine, theirs in zip(found, wanted, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", sorted(LOOPS))
@pytest.mark.parametrize(("parts", "tiles"), [(2, 1), (2, 3), (3, 2), (8, 2)])
def test_schedules_have_no_race_and_no_deadlock(name: str, parts: int, tiles: int) -> None:
    """Also one loop after another of a different kind, over five epochs."""
    loop = LOOPS[name](parts, parts * 4, tiles)
    check_schedule([loop] * 5)
    others = [LOOPS[other](parts, parts * 4, tiles) for other in sorted(LOOPS)]
    check_schedule([*others, loop, *others[::-1]])


def mutated(programs: list[list[list[Step]]], kind: str, rng: random.Random) -> str:
    """Break one schedule in place; says what was done, "" where there is nothing of the kind to break."""
    rank = rng.randrange(len(programs))
    epoch = rng.randrange(len(programs[rank]) - 1)
    found = programs[rank][epoch]
    if kind == "missing epoch":
        programs[rank][epoch + 1] = list(found)
        return kind
    if kind == "early signal":
        chosen = [i for i in range(1, len(found)) if found[i].kind == "signal" and found[i - 1].kind in ("compute", "publish")]
    elif kind == "swapped chunks":
        chosen = [i for i, s in enumerate(found) if s.kind == "compute" and s.how in ("first", "add")]
    else:
        chosen = [i for i, s in enumerate(found) if s.kind == kind.split()[1]]
    if not chosen:
        return ""
    at = rng.choice(chosen)
    if kind == "weaker wait":
        found[at] = found[at]._replace(value=0)
    elif kind == "early signal":
        found[at - 1], found[at] = found[at], found[at - 1]
    elif kind == "swapped chunks":
        found[at] = found[at]._replace(chunk=(found[at].chunk + 1) % len(programs))
    else:
        del found[at]
    return kind


MUTANTS = ["dropped signal", "dropped wait", "dropped compute", "dropped publish", "dropped collect", "dropped merge"]
MUTANTS += ["weaker wait", "early signal", "swapped chunks", "missing epoch"]


@pytest.mark.parametrize("kind", MUTANTS)
def test_every_broken_schedule_is_caught(kind: str) -> None:
    """Whatever is broken, in whichever loop of four: the replay refuses it. (A dropped wait may be implied by another one; then the
    replay lets it pass, and the bits are right under every adversary.)"""
    rng = random.Random(kind)
    caught = 0
    for name in ("scatter", "reduce", "send", "gather", "both", "scatter, own chunk at once", "reduce, own chunk at once"):
        loops = [LOOPS[name](3, 6, 2) for _ in range(4)]
        for _ in range(10):
            programs = [[list(steps(loop, rank, epoch)) for epoch, loop in enumerate(loops)] for rank in range(3)]
            if not mutated(programs, kind, rng):
                break
            try:
                check_schedule(loops, programs)
            except ProgramError:
                caught += 1
                continue
            assert kind == "dropped wait", f"{kind} of {name} lives"
            for order in range(4):
                together = TogetherLoops(3, order)
                for epoch, loop in enumerate(loops):
                    operands = operands_of(loop, epoch)
                    found = together.run(ready(loop), operands, [programs[rank][epoch] for rank in range(3)])
                    assert_bits(found, expected(loop, operands))
    assert caught


ORDERED = {"both", "both, own chunk at once"}
"""Their two chains of signals happen to order a buffer without halves too."""


@pytest.mark.parametrize("name", sorted(set(LOOPS) - ORDERED))
def test_buffers_without_halves_would_race(name: str) -> None:
    loops = [LOOPS[name](3, 6, 2) for _ in range(3)]
    check_schedule(loops)
    with pytest.raises(ProgramError, match="no order"):
        check_schedule(loops, halves=1)


def test_a_dropped_signal_hangs_and_says_who() -> None:
    loop = LOOPS["scatter"](2, 4, 1)
    scripts = [[s for s in steps(loop, rank, 0) if not (rank == 0 and s.kind == "signal")] for rank in range(2)]
    with pytest.raises(RankHung, match="slot"):
        TogetherLoops(2).run(ready(loop), operands_of(loop, 0), scripts)


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_a_loop_is_text_and_integers(name: str) -> None:
    loop = LOOPS[name](3, 12, 2)
    region, numbers, axis, parts = loop.words()
    assert read_tile_loop(region, numbers, axis, parts) == loop
    assert not any(str(n) in region.replace('"', "") for n in (12,))


@given(chunk=st.integers(1, 300), tiles=st.integers(1, 9), growth=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_tiles_follow_each_other_and_none_is_empty(chunk: int, tiles: int, growth: int) -> None:
    loop = replace(product_into("reduce_scatter", 2, 2 * chunk, min(tiles, chunk)), growth=growth)
    spans = [loop.tile(c, t) for c in range(2) for t in range(loop.tiles)]
    assert all(length >= 1 for _, length in spans)
    assert [start for start, _ in spans] == [sum(length for _, length in spans[:k]) for k in range(len(spans))]
    assert sum(length for _, length in spans) == loop.rows


def test_only_what_is_added_up_over_ranks_can_be_computed_eagerly() -> None:
    region, numbers, axis, parts = LOOPS["gather"](2, 4, 1).words()
    with pytest.raises(ProgramError, match="eagerly"):
        read_tile_loop(region.replace('"eager":false', '"eager":true'), numbers, axis, parts)


@pytest.mark.parametrize("broken", ["{", '{"reads":[]}', '{"calls":[],"reads":[["odd",null]],"results":[]}'])
def test_malformed_loops_are_refused(broken: str) -> None:
    with pytest.raises(ProgramError):
        read_tile_loop(broken, [4, 1], "tp", 2)


def test_loops_that_cannot_be_run_are_refused() -> None:
    region, numbers, axis, _ = LOOPS["scatter"](2, 4, 1).words()
    with pytest.raises(ProgramError, match="4 rows"):
        read_tile_loop(region, numbers, axis, 3)
    with pytest.raises(ProgramError, match="slot"):
        read_tile_loop(region.replace('"slot":1', '"slot":9'), numbers, axis, 2)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 5), st.integers(0, 2), st.data())
@settings(max_examples=40, deadline=None)
def test_narrow_and_place_are_inverse(outer: int, inner: int, rows: int, dim: int, data: st.DataObject) -> None:
    shape = [2, 3, 2]
    shape[dim] = outer * rows * inner
    value = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    edge = data.draw(st.integers(1, rows - 1))
    cut, whole = Cut(dim, outer, inner), torch.zeros(shape)
    for start, length in ((0, edge), (edge, rows - edge)):
        place(whole, narrow(value, cut, rows, start, length), cut, rows, start)
    assert torch.equal(whole, value)


class Together:
    """Communicators of ranks that are threads of this process: every collective is a meeting of all."""

    def __init__(self, parts: int) -> None:
        self.parts, self.given = parts, [None] * parts
        self.barrier = threading.Barrier(parts)

    def end(self, rank: int) -> SimpleNamespace:
        """The communicator of a rank."""

        def meet(kind: str, tensor: torch.Tensor, *extra: object) -> torch.Tensor:
            self.given[rank] = (tensor, extra[:-1])
            self.barrier.wait(20)
            tensors, extras = zip(*self.given, strict=True)
            result = group_results(kind, tensors, extras)[rank]
            self.barrier.wait(20)
            return result

        kinds = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all")
        return SimpleNamespace(wait=lambda found: found, **{kind: functools.partial(meet, kind) for kind in kinds})


@pytest.mark.parametrize("name", sorted(LOOPS))
def test_without_shared_memory_a_loop_is_the_region_and_its_collectives(name: str) -> None:
    loop = LOOPS[name](3, 12, 2)
    operands, together = operands_of(loop, 9), Together(3)

    def rank(number: int) -> list[torch.Tensor]:
        return run_whole(loop, ready(loop).body(loop.rows), operands[number], together.end(number))

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(rank, range(3)))
    assert_bits(found, expected(loop, operands))
