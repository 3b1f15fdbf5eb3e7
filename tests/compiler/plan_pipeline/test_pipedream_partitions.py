"""PipeDream's published partitions follow from its published profiles; the recurrence is optimal on small chains."""

import csv
import itertools
import random
from pathlib import Path

import pytest

from hocket.compiler.plan.pipeline.pipedream import Layer, Level, ReplicatedStage, pipedream, steady_seconds
from hocket.errors import InputError

PROFILES = Path(__file__).parent / "profiles"
ETHERNET, PCIE = 10e9 / 8, 12e9


def profile(name: str) -> list[Layer]:
    lines = [line for line in (PROFILES / f"{name}.csv").read_text().splitlines() if not line.startswith("#")]
    return [
        Layer(
            (float(row["forward_ms"]) + float(row["backward_ms"])) / 1e3, float(row["weight_bytes"]), float(row["activation_bytes"])
        )
        for row in csv.DictReader(lines)
    ]


def test_vgg16_on_four_devices_is_three_and_one() -> None:
    assert pipedream(profile("vgg16"), [Level(4, ETHERNET)]).configuration == "3-1"


CLUSTERS = {"sixteen devices": [Level(16, ETHERNET)], "four machines of four": [Level(4, PCIE), Level(4, ETHERNET)]}


@pytest.mark.parametrize("name", CLUSTERS)
def test_resnet50_on_sixteen_devices_is_data_parallel(name: str) -> None:
    """As in the paper's table 1."""
    assert pipedream(profile("resnet50"), CLUSTERS[name]).configuration == "data parallel"


def test_resnet50_is_eight_four_four_where_sums_are_added_to_the_work() -> None:
    """As in the configuration published with the authors' optimizer for sixteen devices."""
    assert pipedream(profile("resnet50"), CLUSTERS["four machines of four"], overlap=False).configuration == "8-4-4"


def test_gnmt_on_four_devices_is_straight() -> None:
    found = pipedream(profile("gnmt_large"), [Level(4, ETHERNET)])
    assert found.configuration == "straight"
    assert found.in_flight == 4


def test_vgg16_on_sixteen_devices_is_fifteen_and_one() -> None:
    """All convolutions on fifteen devices, the large classifier on one: the paper's table 1, and the published stage files."""
    layers = profile("vgg16")
    convolutions = next(i for i, layer in enumerate(layers) if layer.weights > 1e8)
    found = pipedream(layers, [Level(16, ETHERNET)])
    assert found.configuration == "15-1"
    assert abs(found.stages[0].stop - convolutions) <= 1  # a layer without weights may stand on either side
    alone = steady_seconds(layers, Level(16, ETHERNET), [ReplicatedStage(0, len(layers), 16)])
    assert alone > 2 * found.seconds


def test_small_models_on_a_fast_network_are_data_parallel() -> None:
    layers = [Layer(0.1, 1e6, 1e8)] * 5
    found = pipedream(layers, [Level(4, 10e9)])
    assert found.configuration == "data parallel"
    assert found.stages == (ReplicatedStage(0, 5, 4),)


def partitions(layers: int, devices: int) -> list[list[ReplicatedStage]]:
    """All of them, on all devices."""
    found = []
    for count in range(1, min(layers, devices) + 1):
        for cuts in itertools.combinations(range(1, layers), count - 1):
            for shares in itertools.product(range(1, devices + 1), repeat=count):
                if sum(shares) == devices:
                    bounds = [0, *cuts, layers]
                    found.append([ReplicatedStage(a, b, r) for (a, b), r in zip(itertools.pairwise(bounds), shares, strict=True)])
    return found


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_no_partition_of_a_small_chain_is_faster(seed: int, *, overlap: bool) -> None:
    rng = random.Random(seed)
    layers = [Layer(rng.uniform(0.1, 1), rng.choice((0, 1e8, 1e9)), rng.choice((1e6, 1e8))) for _ in range(rng.randint(1, 5))]
    level = Level(rng.randint(1, 4), 1e9)
    found = pipedream(layers, [level], overlap=overlap)
    assert found.seconds == pytest.approx(steady_seconds(layers, level, found.stages, overlap=overlap))
    best = min(steady_seconds(layers, level, stages, overlap=overlap) for stages in partitions(len(layers), level.workers))
    assert found.seconds == pytest.approx(best)


def test_two_levels_use_every_device_once() -> None:
    found = pipedream(profile("vgg16"), [Level(4, PCIE), Level(2, ETHERNET)])
    assert sum(stage.replicas for stage in found.stages) == 8
    assert [stage.start for stage in found.stages[1:]] == [stage.stop for stage in found.stages[:-1]]


def test_straight_pipelines_do_not_replicate() -> None:
    found = pipedream(profile("vgg16"), [Level(4, ETHERNET)], straight=True)
    assert [stage.replicas for stage in found.stages] == [1, 1, 1, 1]
    with pytest.raises(InputError, match="2 layers cannot be 4 stages"):
        pipedream(profile("vgg16")[:2], [Level(4, ETHERNET)], straight=True)


def test_senseless_clusters_are_refused() -> None:
    with pytest.raises(InputError, match="positive bandwidth"):
        pipedream([Layer(1, 1, 1)], [Level(2, 0)])
