"""Tile loops beside what a person would otherwise run: products with gloo, with shared memory, and torch's async-TP algorithm.

Two real ranks of one thread each. Times are those of the slower rank; contenders take turns.
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable

import torch
from common import Row, Sample, arguments, equal, machine, measured, progress, report, versus
from tiles_link import bound, first_share, median_of, name_of
from tiles_model import TILES, Device, calibrated, chosen_form, is_fused, sublayer_seconds, sublayers
from tiles_patterns import pattern_rows
from tiles_ranks import Ranks
from tiles_step import linked_rows, step_rows
from tiles_swaps import swap_rows

from hocket.compiler.cost.cluster import Cluster
from hocket.compiler.rules.table import RuleTable
from hocket.passes.tiles.predict import ON_LINK
from hocket.runtime.transports.transport import LinkCost

PARTS = 2
NAMES = ("product alone", "gloo", "shared memory", "async-TP algorithm", "tile loop")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INTRO = """
A *tile loop* is one instruction that holds a matrix product and the collective beside it: every rank computes chunk by chunk, and
its products accumulate straight into the memory of the rank that owns the chunk. *Hidden* is the part of what gloo adds to the
product alone that is gone (E of Flux, arXiv 2406.06858). bf16 sums are slow in torch on the CPU, which is a good part of what the
loop saves there; on a machine without a unit for bf16 those rows are left out.

The costs by which loops are chosen are those of ``hocket calibrate``, measured at the start of the same run.

Two bounds say what a loop can reach. In shared memory it cannot be quicker than the product alone, so no speed-up over shared
memory exceeds the one given beside it. Over a link nothing travels while the first tile is computed: the part that can be hidden at
most is given beside what is. The link is emulated: bytes lie in shared memory, and are seen when a wire of that latency and
bandwidth would have delivered them.
"""


def products(ranks: Ranks, repeats: int, *, quick: bool) -> list[Row]:
    """mm -> reduce_scatter, mm -> all_reduce, all_gather -> mm, by every contender."""
    rows: list[Row] = []
    slow_bf16 = has_slow_bf16(ranks)
    if slow_bf16:
        progress("no bf16 rows: this machine has no unit for it, and one product would take seconds")
    shapes = [(1024, 1024, 1024)] if quick else [(1024, 1024, 1024), (2048, 1024, 2048)]
    for kind in ("reduce_scatter", "all_reduce", "all_gather"):
        for shape in shapes:
            for label, dtype in DTYPES.items():
                if dtype == torch.bfloat16 and (slow_bf16 or shape != shapes[0]):
                    continue
                case = f"{'x'.join(map(str, shape))} {label}"
                progress(f"{kind} {case}")
                names = [n for n in NAMES if kind != "all_reduce" or n != "async-TP algorithm"]
                timed = ranks.within(3.0, repeats, "product", kind, shape, dtype, names)
                found = {n: Sample(tuple(v)) for n, v in timed.items()}
                rows += compared(kind, case, label, found)
    return rows


def has_slow_bf16(ranks: Ranks) -> bool:
    """Whether products in bf16 are much slower than in fp32: the CPU has no unit for them, and there is nothing to measure."""
    bf16, fp32 = (next(iter(ranks.times("products", [(128, 128, 128)], dtype, 3).values())) for dtype in DTYPES.values())
    return min(bf16) > 4 * min(fp32)


def compared(kind: str, case: str, label: str, found: dict[str, Sample]) -> list[Row]:
    """The rows of one case."""
    claim = f"all_gather -> product, {PARTS} ranks" if kind == "all_gather" else f"product -> {kind}, {PARTS} ranks"
    loop, alone, gloo, shared = (found[name] for name in ("tile loop", "product alone", "gloo", "shared memory"))
    hidden = 1 - (loop.median - alone.median) / (gloo.median - alone.median)
    bound = f"the product alone would be {shared.median / alone.median:.2f}x"
    goal = kind != "all_gather"
    least = {"bf16": 1.3, "fp32": 1.15}[label] if goal else None
    text = f"{hidden:.3f} of what gloo adds; loop / product alone = {loop.median / alone.median:.3f}"
    rows = [
        versus(claim, f"{case}: against gloo", loop, "gloo", gloo),
        versus(claim, f"{case}: against shared memory ({bound})", loop, "shared memory", shared, least),
        Row(claim, f"{case}: hidden", hidden, "", goal=">= 0.95" if goal else "", met=hidden >= 0.95 if goal else None, text=text),
    ]
    if "async-TP algorithm" in found:
        rows.append(versus(claim, f"{case}: against async-TP's algorithm", loop, "async-TP", found["async-TP algorithm"], least))
    return rows


def memory(ranks: Ranks) -> list[Row]:
    """Bytes sent and held, against the formulas."""
    m, _, n = shape = (1024, 512, 768)
    sent, held = ranks("wire_of", "reduce_scatter", shape, torch.float32)[0]
    whole = 4 * m * n
    claim = "bytes of product -> reduce_scatter, per rank"
    return [
        equal(claim, "sent", sent, "bytes", whole * (PARTS - 1) / PARTS, "formula (W-1)/W M N"),
        equal(claim, "buffer of one loop (the M x N partial sum is never made)", float(held), "bytes", whole / PARTS, "M N / W"),
    ]


def links(ranks: Ranks, cluster: Cluster, repeats: int, *, quick: bool) -> list[Row]:
    """An emulated link that takes ``rho`` times as long as the product: what is hidden with the form that the pass chooses."""
    shape, rules = (1024, 1024, 1024), RuleTable(None)
    m, _, n = shape
    every = [(tiles, growth, eager) for tiles, growth in ON_LINK for eager in (False, True)]
    alone = statistics.median(ranks.times("link", shape, every[:1], (0.0, 0.0), 5)["product alone"])
    rows, regrets = [], []
    for rho in (0.5, 1.0) if quick else (0.25, 0.5, 1.0, 2.0):
        progress(f"emulated link, wire / compute = {rho}")
        alpha, nbytes = 2e-5, 4.0 * m * n / PARTS
        beta = max(0.0, rho * alone - alpha) / nbytes
        found = median_of(ranks.times("link", shape, every, (alpha, beta), repeats))
        loop, predicted = chosen_form("reduce_scatter", shape, torch.float32, cluster.over(LinkCost(alpha, beta)), rules)
        chosen = name_of((loop.tiles, loop.growth, loop.eager))
        best = min(found[name_of(form)] for form in every)
        regrets.append(found[chosen] / best - 1)
        wire = alpha + beta * nbytes
        before = found["apart"] - max(alone, wire)
        hidden, most = (found["apart"] - found[chosen]) / before, bound(alone, wire, first_share(loop.tiles, loop.growth))
        text = (
            f"{hidden:.2f} hidden (at most {most:.2f}): {found['apart'] * 1e3:.1f} -> {found[chosen] * 1e3:.1f} ms with {chosen} "
            f"(best {best * 1e3:.1f}, predicted {predicted * 1e3:.1f}); 4 equal tiles, own chunk last: "
            f"{(found['apart'] - found['4 tiles']) / before:.2f}, at most {bound(alone, wire, first_share(4, 1)):.2f}"
        )
        ratio = found["apart"] / found[chosen]
        case = f"1024x1024x1024 fp32, wire / compute = {rho}"
        rows.append(Row("emulated link", case, hidden, "", {}, ratio, ">= 0.9", hidden >= 0.9, text=text))
    regret = statistics.median(regrets)
    case, met = "regret of the chosen form, median", regret <= 0.05
    rows.append(Row("emulated link", case, regret, "", goal="<= 5%", met=met, text=f"{regret:.1%}"))
    return rows


def never_slower(ranks: Ranks, cluster: Cluster, count: int, repeats: int) -> list[Row]:
    """Random shapes: fused where the model says so, else left as they are."""
    rules, rng = RuleTable(None), random.Random(7)
    slower, fused = [], 0
    for number in range(count):
        kind, label = rng.choice(("reduce_scatter", "all_reduce", "all_gather")), "fp32"
        shape = (2 * rng.randint(4, 512), 2 * rng.randint(8, 384), 2 * rng.randint(8, 384))
        if not is_fused(kind, shape, DTYPES[label], cluster, rules):
            slower.append(1.0)
            continue
        fused += 1
        times = ranks.times("product", kind, shape, DTYPES[label], ("shared memory", "tile loop"), repeats)
        slower.append(statistics.median(times["tile loop"]) / statistics.median(times["shared memory"]))
        if number % 50 == 0:
            progress(f"random shape {number} of {count}")
    sample = Sample(tuple(slower), "")
    worst = sample.percentile(95)
    text = f"{worst:.3f} of the time unfused at the 95th percentile, {sample.median:.3f} at the median; {fused} of {count} fused"
    costs = cluster.tiles
    costs_text = (
        f"a loop {costs.begin * 1e6:.0f} us, a tile {costs.turn * 1e6:.0f} us, a byte of weights {costs.repack * 1e12:.0f} ps, "
        f"doubt {costs.doubt * 1e6:.0f} us, spread {costs.spread:.0%}"
    )
    return [
        Row("never slower", f"{count} random shapes, fp32", worst, "", goal="<= 1.02", met=worst <= 1.02, text=text),
        Row("never slower", "calibrated", costs.begin, text=costs_text),
    ]


def simulated(ranks: Ranks) -> list[Row]:
    """T3's sublayers from product speeds by height measured here, on a stated device and link."""
    device = Device()
    rows_of = sorted({layer.rows // layer.parts // tiles for layer in sublayers() for tiles in TILES})
    shapes = [(height, 512, 768) for height in rows_of]
    speed = {}
    for shape, found in zip(shapes, ranks.times("products", shapes, torch.float32, 3).values(), strict=True):
        speed[shape[0]] = shape[0] / min(found)
    efficiency = {height: min(1.0, speed[height] / speed[rows_of[-1]]) for height in rows_of}
    gains = []
    rows = []
    for layer in sublayers():
        found = sublayer_seconds(layer, efficiency, device)
        ratio, ideal = found["apart"] / found["loop"], found["apart"] / found["ideal"]
        gains.append(ratio)
        text = f"{found['apart'] * 1e3:.2f} -> {found['loop'] * 1e3:.2f} ms; ideal overlap {ideal:.2f}x"
        case = f"{layer.model} {layer.name}, TP={layer.parts}"
        rows.append(Row("T3's sublayers", case, found["loop"], "s", {"apart": found["apart"]}, ratio, simulated=True, text=text))
    mean = statistics.geometric_mean(gains)
    text = f"geometric mean {mean:.2f}x, largest {max(gains):.2f}x; T3-MCA's own simulation: 1.30x and 1.47x, ideal 1.35x and 1.50x"
    rows.append(Row("T3's sublayers", "all", mean, "", {}, mean, simulated=True, text=text))
    return rows


def main() -> None:
    """Run all groups, print, check."""
    options = arguments(__doc__)
    where, repeats = machine(), 5 if options.quick else 9
    with Ranks(PARTS) as ranks:
        here = functools.cache(calibrated)  # once, where a group asks for it
        groups: dict[str, Callable[[], list[Row]]] = {
            "products": lambda: products(ranks, repeats, quick=options.quick),
            "bytes": lambda: memory(ranks),
            "step": lambda: step_rows(ranks, here(), 3 if options.quick else 5, with_bf16=not has_slow_bf16(ranks)),
            "linked": lambda: linked_rows(ranks, here(), 3 if options.quick else 5, quick=options.quick),
            "link": lambda: links(ranks, here(), 3 if options.quick else 5, quick=options.quick),
            "swaps": lambda: swap_rows(ranks, here(), 3 if options.quick else 5, quick=options.quick),
            "never": lambda: never_slower(ranks, here(), 20 if options.quick else 200, 3),
            "patterns": pattern_rows,
            "t3": lambda: simulated(ranks),
        }
        rows = measured(groups, options)
    report("tiles", "Tile loops", INTRO, rows, options, where)


if __name__ == "__main__":
    main()
