"""The claims about pipelines: step time against torch.distributed.pipelining, 2BP's table, the simulator, schedules by search.

    python benchmarks/pipeline.py [--quick] [--json FILE] [--check] [--only TEXT]

Groups are run one by one with --only: "ranks m=4", "ranks m=8", "inductor m=4", "table Llama", "split", "search", "joined", ...;
a group takes some four minutes at most on a quiet machine. Real steps run on two processes with one thread each; every schedule
that torch has takes its turn in the same run. What needs more ranks is simulated and says so. A full run takes half an hour and
rewrites docs/benchmarks/pipeline.md.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable

import pipeline_joined
import pipeline_optimizer
import pipeline_packed
import pipeline_plan
import pipeline_split
from common import Row, Sample, arguments, at_most, machine, progress, report, versus
from pipeline_models import CASES
from pipeline_ranks import TABLE, Found, Setting, measure

from hocket.compiler.demo.llama import LlamaConfig

INTRO = """
A Llama-like model (8 layers of width 256, 256 tokens per micro-batch) trained on two ranks with one thread each: hocket's schedules
and every schedule of `torch.distributed.pipelining`, alternating in the same run. All are cut between the same layers, but for
those called "own", which hocket cuts by itself, inside of layers too: with the head on one rank, equal numbers of layers are
unequal work. hocket tries the five schedules that its simulator predicts to be the fastest, from costs traced during the first
steps, for some steps each, lets the slower half go, and runs the one that is left in the end. Figures are medians; ± is half the
distance between the quartiles. "Simulated" figures come from the discrete-event simulator. With Inductor, torch's schedules that
do not split the backward run compiled stages too.

Schedules by search: stage costs are drawn at random; forms by hand run on stages balanced by work, the search may also choose cuts,
placement and uneven micro-batches of the same total, within the same memory and eight seconds, so figures differ a little from run
to run.
"""


def config(*, quick: bool) -> LlamaConfig:
    """The model."""
    return LlamaConfig(vocabulary=1024, width=256, layers=4 if quick else 8, heads=4, kv_heads=4, hidden=688, context=256)


def rank_rows(count: int, *, quick: bool) -> list[Row]:
    """Real steps against torch's, and the simulator's error."""
    rounds = 3 if quick else 9 if count == 4 else 5
    found = measure(Setting(config(quick=quick), count, rounds, 2.0 if quick else 3.0))
    return _against_torch(found, count, "two real ranks", 1.15) + _simulator_error(found, count)


def inductor_rows(count: int, *, quick: bool) -> list[Row]:
    """The same with every part compiled, which torch's split schedules refuse."""
    rounds = 3 if quick else 9 if count == 4 else 5
    found = measure(Setting(config(quick=quick), count, rounds, 2.0 if quick else 3.0, inductor=True))
    return _against_torch(found, count, "two real ranks, parts compiled by Inductor", 1.25)


def _against_torch(found: Found, count: int, claim: str, goal: float) -> list[Row]:
    samples = {name: Sample(tuple(values)) for name, values in found.seconds.items()}
    torch_names = [name for name in samples if name.startswith("torch ")]
    best = min(torch_names, key=lambda name: samples[name].median)
    rows = []
    ours = samples[f"hocket {found.chosen}"]
    rows.append(versus(claim, f"m = {count}: {found.chosen} (chosen) vs {best}, torch's best", ours, best, samples[best], goal))
    case = f"m = {count}: {found.chosen} (chosen)"
    limit = samples[best].median / found.bound
    text = f"no schedule of these stages is faster than {found.bound * 1e3:.0f} ms, by the costs traced"
    rows.append(Row(claim, f"m = {count}: the most that is possible vs {best}", limit, "x", {}, limit, simulated=True, text=text))
    rows += [versus(claim, f"{case} vs {name}", ours, name, samples[name]) for name in torch_names]
    others = [name for name in samples if name.startswith("hocket ") and name != f"hocket {found.chosen}"]
    rows += [versus(claim, f"m = {count}: {name} vs {best}", samples[name], best, samples[best]) for name in others]
    agree = Sample((found.gradients_agree,), "of the norm")
    rows.append(at_most(claim, f"m = {count}: largest difference of a gradient's norm from torch's", agree, 1e-5))
    return rows


def _simulator_error(found: Found, count: int) -> list[Row]:
    rows = []
    for name, predicted in found.in_situ.items():
        measured = statistics.median(found.seconds[f"hocket {name}"])
        error = abs(predicted / measured - 1)
        chunks = name in ("interleaved", "zb-v") or name.endswith((" v", " wave"))
        limit = 0.05 if chunks else 0.03
        text = f"{predicted * 1e3:.1f} ms predicted, {measured * 1e3:.1f} ms measured"
        goal = f"within {limit:.0%}"
        rows.append(Row("simulator", f"m = {count}: {name}", error, "", {}, None, goal, error <= limit, text=text))
    return rows


def table_rows(model: str, *, quick: bool) -> list[Row]:
    """2BP's four rows on two real ranks, each beside the gain that the simulator gives for the costs traced in the same run."""
    rows = []
    found = measure(Setting(config(quick=True), 4, 3 if quick else 9, table=model))
    for name, count in TABLE:
        base, split = (statistics.median(found.seconds[f"{form} m={count}"]) for form in (name, f"{name}-2bp"))
        bound = found.predicted[f"{name} m={count}"] / found.predicted[f"{name}-2bp m={count}"]
        text = f"{base / split:.3f}x, {bound:.3f}x simulated from the costs traced"
        case = f"{model}: 2 real ranks, {name}, m = {count}"
        rows.append(_gain_row(case, base / split, bound, text))
    for case, (gain, bound) in found.deeper.items():
        text = f"{gain:.3f}x, at most {bound:.3f}x"
        rows.append(dataclasses.replace(_gain_row(f"{model}: {case}", gain, bound, text), simulated=True))
    return rows


def _gain_row(case: str, gain: float, bound: float, text: str) -> Row:
    met = gain >= 0.95 * bound
    return Row("two-stage backward", case, gain, "x", {"bound": bound}, gain, ">= 95 % of it", met, text=text)


def main() -> None:
    """Measure the groups that are asked for and report them."""
    options = arguments(__doc__)
    where = machine()
    quick = options.quick
    counts, models = ((4,), ("Llama",)) if quick else ((4, 8), ("Llama", *CASES))
    groups: dict[str, Callable[[], list[Row]]] = {
        **{f"ranks m={count}": functools.partial(rank_rows, count, quick=quick) for count in counts},
        **{f"inductor m={count}": functools.partial(inductor_rows, count, quick=quick) for count in counts},
        **{f"table {model}": functools.partial(table_rows, model, quick=quick) for model in models},
        "split": lambda: pipeline_split.rows(quick=quick),
        "packed": lambda: pipeline_packed.rows(quick=quick),
        "search": lambda: pipeline_plan.synthesis_rows(quick=quick),
        "taper": pipeline_plan.taper_rows,
        "planning": pipeline_plan.speed_rows,
        "joined": lambda: pipeline_joined.rows(quick=quick),
        "optimizer": lambda: pipeline_optimizer.rows(config(quick=True), quick=quick),
    }
    rows: list[Row] = []
    for name, rows_of in groups.items():
        if options.only in name:
            progress(name)
            rows += rows_of()
    report("pipeline", "Pipelines", INTRO, rows, options, where)


if __name__ == "__main__":
    main()
