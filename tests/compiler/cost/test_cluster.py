"""Clusters are validated, saved whole or not at all, and fitted from measurements."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hocket.compiler.cost.calibrate import calibrate, fit_collectives, wire_share
from hocket.compiler.cost.cluster import COLLECTIVES, Cluster, Line, TileCosts, default_path
from hocket.compiler.cost.fit import fit_line, quiet, spread
from hocket.compiler.cost.tile_timing import LoopTimer, fit_tiles
from hocket.compiler.errors import InputError
from hocket.compiler.layout import Partial, Replicate, Shard
from hocket.compiler.redistribute import StepKind, steps, wire_bytes
from hocket.passes.tiles.fuse import least_seconds
from hocket.runtime.engines.sim import SimEngine
from hocket.runtime.mesh import Mesh
from hocket.runtime.transports.transport import LinkCost


def test_a_cluster_survives_saving(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    slow = dataclasses.replace(Cluster.default(), axes={"dp": {StepKind.ALL_REDUCE: Line(1.0, 2.0)}}, op_overhead=1.5e-6)
    assert Cluster.current() == Cluster.default()
    assert slow.save() == default_path("cpu")
    assert Cluster.current() == slow
    assert [p.name for p in (tmp_path / "hocket").iterdir()] == ["cluster-cpu.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = Cluster.default().save(tmp_path / "c.json")
    before = path.read_text()
    monkeypatch.setattr(json, "dump", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Cluster.default("cuda").save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 9}, "version 1; found 9"),
        ({"memory_bandwidth": 0}, "memory_bandwidth must be a positive"),
        ({"memory_bandwidth": "fast"}, "not a cluster description"),
        ({"flops": {"float64": 1.0}}, "float32"),
        ({"op_overhead": -1}, "op_overhead"),
        ({"collectives": {}}, "all_reduce, all_gather, reduce_scatter, all_to_all is missing"),
        ({"tiles": {"begin": -1.0}}, "begin of a tile loop"),
        ({"tiles": {"magic": 1.0}}, "not a cluster description"),
        ({"collectives": {"telepathy": {"alpha": 0, "beta": 0}}}, "telepathy"),
        ({"axes": {"dp": {"all_reduce": {"alpha": -1, "beta": 0}}}}, "alpha and beta"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, message):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**Cluster.default().to_json(), **change}))
    with pytest.raises(InputError, match=message):
        Cluster.load(path)


def test_no_file_and_no_json_are_refused(tmp_path):
    with pytest.raises(InputError, match="expected a cluster description"):
        Cluster.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(InputError, match="expected a cluster description"):
        Cluster.load(tmp_path / "bad.json")


def test_unknown_devices_are_refused():
    with pytest.raises(InputError, match='"cpu" or "cuda"; found \'tpu\''):
        Cluster.default("tpu")


def test_an_axis_may_have_its_own_line():
    slow = Line(1.0, 0.0)
    cluster = dataclasses.replace(Cluster.default(), axes={"dp": {StepKind.ALL_REDUCE: slow}})
    assert cluster.line(StepKind.ALL_REDUCE, "dp") is slow
    assert cluster.line(StepKind.ALL_GATHER, "dp") == cluster.line(StepKind.ALL_GATHER, "tp")


def test_lines_are_recovered_from_exact_times():
    lines = {kind: Line(1e-5 * (i + 1), 1e-9 * (i + 2)) for i, kind in enumerate(COLLECTIVES)}
    found = fit_collectives(lambda kind, size: lines[kind].seconds(wire_share(kind, 4) * size, 4), ranks=4)
    for kind in COLLECTIVES:
        assert (found[kind].alpha, found[kind].beta) == pytest.approx((lines[kind].alpha, lines[kind].beta))


def test_fits_are_never_negative():
    rng = np.random.default_rng(0)
    for _ in range(200):
        slope, intercept = fit_line({float(x): float(y) for x, y in zip((1, 8, 64, 512), rng.uniform(0.1, 5, 4), strict=True)})
        assert slope >= 0
        assert intercept >= 0
        assert slope + intercept > 0


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_wire_share_is_that_of_planning(ranks):
    shape, whole = (ranks * 4, ranks * 6), ranks * ranks * 24 * 4
    ends = {
        StepKind.ALL_REDUCE: (Partial("sum"), Replicate()),
        StepKind.ALL_GATHER: (Shard(0), Replicate()),
        StepKind.REDUCE_SCATTER: (Partial("sum"), Shard(0)),
        StepKind.ALL_TO_ALL: (Shard(0), Shard(1)),
    }
    mesh = Mesh((("d", ranks),))
    for kind, (source, target) in ends.items():
        (step,) = steps((source,), (target,))
        assert step.kind is kind
        assert wire_bytes(step, shape, 4, mesh) == pytest.approx(wire_share(kind, ranks) * whole)


def test_calibration_measures_this_machine():
    threads = torch.get_num_threads()
    found = calibrate(lambda kind, size: 1e-4 + 1e-9 * size, ranks=2, dtypes=(torch.float32,), seconds=0.5)
    assert torch.get_num_threads() == threads
    assert found.flops["float32"] > 1e8
    assert found.memory_bandwidth > 1e8
    assert 1e-8 < found.op_overhead < 1e-2
    assert found.collectives[StepKind.ALL_REDUCE].beta == pytest.approx(1e-9)


def test_senseless_times_are_refused():
    with pytest.raises(InputError, match="must be positive seconds"):
        fit_collectives(lambda kind, size: 0.0, 2)
    with pytest.raises(InputError, match="at least two ranks"):
        calibrate(lambda kind, size: 1.0, ranks=1, seconds=0.1)


def test_costs_of_tile_loops_survive_saving_and_old_files_keep_the_defaults(tmp_path):
    known = dataclasses.replace(Cluster.default(), tiles=TileCosts(begin=1e-3, turn=2e-3, repack=3e-9, measured=True))
    assert Cluster.load(known.save(tmp_path / "c.json")) == known
    old = {key: value for key, value in known.to_json().items() if key != "tiles"}
    assert Cluster.from_json(old).tiles == TileCosts()
    assert "measured on this machine" in known.tiles.origin
    assert "default" in TileCosts().origin


def loop_times(apart: float, ranks: int, begin: float, turn: float, collective: float) -> dict[int, list[float]]:
    """Undisturbed times of loops that cost that much."""
    loops = {n: [apart + begin + ranks * n * turn - collective] * 8 for n in (1, 8)}
    return {0: [apart] * 8, **loops}


def test_costs_of_tile_loops_are_a_line_through_few_and_many_tiles():
    """Three ranks: what a loop of n tiles takes longer than the collective of 2e-4 s."""
    times = loop_times(1e-3, 3, 5e-4, 3e-5, 2e-4)
    found = fit_tiles(lambda: times, 3, 2e-4, budget=0.01)
    assert found.begin == pytest.approx(5e-4)
    assert found.turn == pytest.approx(3e-5)
    assert found.repack >= 0
    assert found.measured
    assert found.spread == 0
    assert found.doubt == TileCosts().doubt
    with pytest.raises(InputError, match="1 and 8 tiles"):
        fit_tiles(lambda: {1: [1.0]}, 2, 1e-4, budget=0.01)
    with pytest.raises(InputError, match="positive"):
        fit_tiles(lambda: {**times, 8: [0.0]}, 2, 1e-4, budget=0.01)


@given(seed=st.integers(0, 1000), busy=st.floats(0.0, 3.0))
@settings(max_examples=20, deadline=None)
def test_other_work_does_not_change_the_costs_of_loops_and_is_seen(seed, busy):
    """Half of the repeats are disturbed, each by up to ``busy`` times itself: the costs stay, doubt and spread grow."""
    rng = random.Random(seed)
    calm = loop_times(1e-3, 2, 5e-4, 3e-5, 2e-4)
    times = {n: [t * (1 + busy * rng.random() * (i % 2)) for i, t in enumerate(found * 3)] for n, found in calm.items()}
    found = fit_tiles(lambda: times, 2, 2e-4, budget=0.01)
    assert found.begin == pytest.approx(5e-4)
    assert found.turn == pytest.approx(3e-5)
    assert 0 <= found.spread <= busy
    assert found.doubt >= TileCosts().doubt


def test_a_machine_that_was_busy_throughout_is_flagged_and_asks_for_more():
    calm = loop_times(1e-3, 2, 5e-4, 3e-5, 2e-4)
    times = {n: [t * (1 + 0.2 * i) for i, t in enumerate(found)] for n, found in calm.items()}
    found = fit_tiles(lambda: times, 2, 2e-4, budget=0.01)
    assert found.is_unsteady
    assert "busy" in found.origin
    assert "hocket calibrate again" in found.origin
    assert least_seconds(0.03, 1.0, found) == pytest.approx(found.spread)
    assert least_seconds(0.03, 1.0, TileCosts(measured=True)) == pytest.approx(0.03)
    assert least_seconds(-1.0, 1.0, found) == -1.0


def test_a_busy_moment_is_waited_out_and_not_for_ever():
    calm = loop_times(1e-3, 2, 5e-4, 3e-5, 2e-4)
    busy = {n: [t * (1 + 0.5 * i) for i, t in enumerate(found)] for n, found in calm.items()}
    moments = iter([busy, busy, calm])
    assert not fit_tiles(lambda: next(moments), 2, 2e-4, budget=0.01).is_unsteady
    asked = []
    assert fit_tiles(lambda: asked.append(1) or busy, 2, 2e-4, budget=0.01).is_unsteady
    assert len(asked) == 4


def test_undisturbed_times_are_the_lowest_decile():
    assert quiet([5.0, 1.0, 9.0]) == 1.0
    assert quiet([float(n) for n in range(20)]) == 2.0
    assert spread([1.0, 2.0, 4.0]) == 1.0


def test_loops_are_timed_on_an_engine():
    assert set(LoopTimer(SimEngine(Mesh((("d", 2),))))()) == {0, 1, 8}


def test_over_a_link_every_collective_takes_its_line():
    slow = Cluster.default().over(LinkCost(1e-3, 1e-6))
    assert slow.link == Line(1e-3, 1e-6)
    assert slow.line(StepKind.ALL_GATHER, "tp").seconds(1000, 2) == pytest.approx(2e-3)
    assert slow.line(StepKind.ALL_REDUCE, "tp").seconds(1000, 2) == pytest.approx(3e-3)
    assert slow.flops == Cluster.default().flops
